"""The cache: equal to no cache, whoever built it and however often it was killed; never stale or silently damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign.data import BadRow, Cache, OnTheFly, Report, _latents, _text, build_cache, estimate_cache_bytes
from diffalign.types import Record, UserError

SETTINGS = {"resolution": 32, "buckets": "aspect", "flip": True, "progress": False}


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Several chunks and text shards from few records."""
    monkeypatch.setattr(_latents, "CHUNK", 4)
    monkeypatch.setattr("diffalign.data._build.CHUNK", 4)
    monkeypatch.setattr(_text, "BLOCK", 3)


def mixed(kit, num=11):
    """Records of several shapes, numbers of candidates and captions; rows 2 and 6 do not decode, row 5 has no image."""
    sizes = [(32, 32), (24, 60), (64, 30)]
    records = []
    for i in range(num):
        k = 1 + (i * 7) % 3
        captions = tuple(f"c{i} {j}" for j in range(k)) if i % 4 == 3 else None
        records.append(kit.record(i, f"prompt {i % 4}", k, sizes[i % 3], captions=captions))
    for i, record in enumerate(records):  # a scorer that every record has, and one that some lack
        scores = {"whole": tuple(float(i + j) for j in range(len(record.images)))}
        records[i] = replace(record, scores=scores | ({"part": scores["whole"]} if i % 2 else {}))
    broken = records[2]
    records[2] = type(broken)(3, broken.prompt, tuple(image[:-60] for image in broken.images), broken.utility)
    records[6] = type(broken)(7, "x", (b"no image",), (1.0,))
    records[5] = BadRow("missing image", "gone", "data", 5)
    return kit.ListReader(records)


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        if name in ("text", "scores"):
            assert_equal(value, right[name])
        else:
            assert value.dtype == right[name].dtype and torch.equal(value, right[name]), name


def requests(data):
    for bucket in data.bucket_counts:
        rows = np.flatnonzero(data.bucket_of(np.arange(len(data))) == bucket)
        yield rows, np.zeros(len(rows), bool)
        yield rows[::-1].copy(), torch.arange(len(rows)) % 2 == 0


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_cached_equals_on_the_fly(kit, tmp_path, dtype):
    encoder = kit.Encoder()
    cache = build_cache(mixed(kit), encoder, tmp_path, dtype=dtype, batch_size=3, **SETTINGS)
    fly = OnTheFly(mixed(kit), kit.Encoder(), dtype=dtype, **SETTINGS)
    assert len(cache) == len(fly) == 8 and cache.buckets == fly.buckets and cache.has_flips and fly.has_flips
    for name in ("ids", "prompt_keys", "rows"):
        assert np.array_equal(getattr(cache, name), getattr(fly, name))
    assert cache.bucket_counts == fly.bucket_counts and sum(cache.bucket_counts.values()) == 8
    assert len(cache.bucket_counts) == 3
    for rows, flips in requests(cache):
        assert_equal(cache.batch(rows, flips), fly.batch(rows, flips))
    assert_equal(cache.empty_text, fly.empty_text)


def test_batch_holds_what_the_record_says(kit, tmp_path):
    three = kit.record(0, num=3, scores={"judge": (3.0, 2.0, 1.0)})
    one = kit.record(1, num=1, size=(40, 50), scores={"judge": (5.0,), "half a column": (1.0,)})
    reader, encoder = kit.ListReader([three, one]), kit.Encoder()
    cache = build_cache(reader, encoder, tmp_path, resolution=32, flip=True, dtype="float32", progress=False)
    batch = cache.batch([0, 1], [False, True])
    assert {name: values.tolist() for name, values in batch["scores"].items()} == {"judge": [[3, 2, 1], [5, 5, 5]]}
    assert batch["ids"].tolist() == [1, 2]
    assert batch["utility"].tolist() == [[2, 1, 0], [0, 0, 0]]
    assert batch["mask"].tolist() == [[True] * 3, [True, False, False]]
    assert torch.equal(batch["mean"][1, 0], batch["mean"][1, 2])  # padding repeats candidate 0
    from diffalign.data._images import decode, fit

    pixels, crop = fit(decode(reader[1].images[0]), (32, 32))
    mean, std = encoder.encode_images((pixels.flip(-1)[None] / 127.5) - 1)
    assert torch.equal(batch["mean"][1, 0], mean[0]) and torch.equal(batch["std"][1, 0], std[0])
    assert batch["original_size"][1, 0].tolist() == [40, 50] and batch["target_size"].tolist() == [[32, 32]] * 2
    assert crop == (0, 4, 4) and batch["crop"][1, 0].tolist() == [0, 4]
    assert torch.equal(batch["text"]["pooled"][0, 0], encoder.encode_prompts(["prompt 0"])["pooled"][0])
    assert batch["mean"].shape == (2, 3, 4, 8, 8) and batch["text"]["prompt_embeds"].shape == (2, 3, 8, 4)


def test_flips_are_really_encoded_not_mirrored_latents(kit, tmp_path):
    class Lopsided(kit.Encoder):
        def encode_images(self, pixels):
            mean, std = super().encode_images(pixels)
            return mean + torch.arange(mean.shape[-1]), std

    cache = build_cache(kit.ListReader([kit.record(0)]), Lopsided(), tmp_path, resolution=32, flip=True, progress=False)
    plain, mirrored = cache.batch([0])["mean"], cache.batch([0], [True])["mean"]
    ramp = torch.arange(8.0)
    assert torch.allclose((plain - ramp).flip(-1), mirrored - ramp, atol=0.02, rtol=0)
    assert not torch.allclose(plain.flip(-1), mirrored, atol=0.5)
    without = build_cache(kit.ListReader([kit.record(0)]), Lopsided(), tmp_path, resolution=32, progress=False)
    with pytest.raises(UserError, match="set flip to true"):
        without.batch([0], [True])


def test_a_batch_of_two_buckets_is_refused(kit, tmp_path):
    cache = build_cache(mixed(kit), kit.Encoder(), tmp_path, **SETTINGS)
    with pytest.raises(UserError, match="one bucket"):
        cache.batch([0, 1])


def test_bad_rows_are_reported_by_build_and_on_the_fly(kit, tmp_path, caplog):
    cache = build_cache(mixed(kit), kit.Encoder(), tmp_path, **SETTINGS)
    report = json.loads((cache.folder / "report.json").read_text())
    assert sum(report["bad"].values()) == 3 and report["num_kept"] == 8 and report["bad"]["missing image"] == 1
    assert {entry["row"] for entry in report["rows"]} >= {5}
    assert cache.report.bad == report["bad"] and cache.report.num_rows == 11
    assert "3 of 11 rows bad" in caplog.text
    assert OnTheFly(mixed(kit), kit.Encoder(), **SETTINGS).report.bad == report["bad"]
    refusing = mixed(kit)
    refusing.bad_rows = "refuse"
    with pytest.raises(BadRow):
        build_cache(refusing, kit.Encoder(), tmp_path / "other", **SETTINGS)
    nothing = kit.ListReader([BadRow("missing image")] * 5)
    with pytest.raises(UserError, match="no rows left.*5 of 5"):
        build_cache(nothing, kit.Encoder(), tmp_path / "none", **SETTINGS)
    with pytest.raises(UserError, match="no rows left"):
        OnTheFly(nothing, kit.Encoder(), **SETTINGS)


def test_each_caption_is_encoded_once_and_shared(kit, tmp_path):
    encoder = kit.Encoder()
    first = kit.ListReader([kit.record(i, f"prompt {i % 5}") for i in range(20)])
    build_cache(first, encoder, tmp_path, resolution=32, progress=False)
    assert encoder.num_prompts == 5 and encoder.num_images == 40
    second = kit.ListReader([kit.record(50 + i, f"prompt {i % 7}") for i in range(14)], "another set")
    cache = build_cache(second, encoder, tmp_path, resolution=32, progress=False)
    assert encoder.num_prompts == 7  # only the two new ones
    expected = encoder.encode_prompts(["prompt 6"])["pooled"][0].half().float()
    assert torch.equal(cache.batch([6])["text"]["pooled"][0, 0], expected)
    images = encoder.num_images
    encoder.marks["text"] = "t2"  # another text encoder: new texts, the same latents
    build_cache(second, encoder, tmp_path, resolution=32, progress=False)
    assert encoder.num_images == images and encoder.num_prompts == 7 + 1 + 7


def test_all_pairs_of_a_prompt_encode_each_image_once(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(_latents, "CHUNK", 64)
    monkeypatch.setattr("diffalign.data._build.CHUNK", 64)
    images = [kit.picture(seed) for seed in range(4)]
    wide = kit.picture(9, (32, 128))
    pairs = [(images[i], images[j]) for i in range(4) for j in range(i)] + [(images[0], wide)]
    records = [Record(number, "prompt", pair, (1.0, 0.0)) for number, pair in enumerate(pairs)]
    encoder = kit.Encoder()
    cache = build_cache(kit.ListReader(records), encoder, tmp_path, dtype="float32", batch_size=3, **SETTINGS)
    size = estimate_cache_bytes(kit.ListReader(records[:6]), encoder, resolution=32)
    assert size.latents == pytest.approx(4 * 2 * (4 * 8 * 8) * 2 + 6 * 600)  # four images, mean and std
    in_two_buckets = 1  # beside a wide one, the first image is cropped otherwise
    assert len(cache.bucket_counts) == 2 and encoder.num_images == 2 * (4 + 1 + in_two_buckets)
    fly = OnTheFly(kit.ListReader(records), kit.Encoder(), dtype="float32", **SETTINGS)
    for rows, flips in requests(cache):
        assert_equal(cache.batch(rows, flips), fly.batch(rows, flips))


def test_a_second_build_does_nothing(kit, tmp_path):
    encoder = kit.Encoder()
    build_cache(mixed(kit), encoder, tmp_path, **SETTINGS)
    before, counts = kit.tree(tmp_path), (encoder.num_images, encoder.num_prompts)
    build_cache(mixed(kit), encoder, tmp_path, **SETTINGS)
    assert kit.tree(tmp_path) == before and (encoder.num_images, encoder.num_prompts) == counts


def test_a_stale_cache_is_never_used(kit, tmp_path):
    records = [kit.record(i) for i in range(5)]
    base = {"resolution": 32, "buckets": "square", "flip": False, "dtype": "float16"}
    variants = [
        ({}, {}, "list"), ({"vae": "v2"}, {}, "list"), ({"text": "t2"}, {}, "list"), ({}, {"resolution": 16}, "list"),
        ({}, {"buckets": "aspect"}, "list"), ({}, {"flip": True}, "list"), ({}, {"dtype": "float32"}, "list"),
        ({}, {}, "edited"),
    ]  # fmt: skip
    folders = set()
    for marks, settings, reader_mark in variants:
        std = 0.1 if not marks else 0.2
        encoder = kit.Encoder(**marks, std=std)
        reader = kit.ListReader(records, reader_mark)
        folders.add(build_cache(reader, encoder, tmp_path, progress=False, **{**base, **settings}).folder)
    assert len(folders) == len(variants)
    one, two = sorted(folders)[:2]
    shutil.rmtree(one)
    shutil.copytree(two, one)  # a set put in another's place
    with pytest.raises(UserError, match="built for something else"):
        Cache.open(one, key=one.name.removeprefix("set-"))


def build_of(kit, folder, **extra):
    return build_cache(mixed(kit), kit.Encoder(), folder, batch_size=3, **SETTINGS, **extra)


def test_two_ranks_write_what_one_writes(kit, tmp_path):
    build_of(kit, tmp_path / "one")
    found = []
    threads = [
        threading.Thread(target=lambda r=rank: found.append(build_of(kit, tmp_path / "two", rank=r, world_size=2)))
        for rank in (1, 0)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert len(found) == 2 and len(found[0]) == 8
    assert kit.tree(tmp_path / "two") == kit.tree(tmp_path / "one")


CHILD = """
import sys, time
sys.path[:0] = sys.argv[2:]
import conftest as kit
from diffalign.data import _latents, _text, build_cache
import diffalign.data._build as b
_latents.CHUNK = b.CHUNK = 4; _text.BLOCK = 3
class Slow(kit.FakeEncoder):
    def encode_images(self, pixels):
        time.sleep(0.2); print("image", flush=True)
        return super().encode_images(pixels)
reader = kit.ListReader([kit.record(i, f"prompt {i % 4}") for i in range(20)])
build_cache(reader, Slow(), sys.argv[1], resolution=32, batch_size=8, progress=False)
"""


def test_sigkill_then_resume_gives_the_same_bytes(kit, tmp_path):
    here = Path(__file__).parent
    command = [sys.executable, "-c", CHILD, str(tmp_path / "cut"), str(here), str(here.parent.parent)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(3):  # in the middle of the third chunk
        assert child.stdout.readline() == "image\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = sorted(path.name for path in tmp_path.rglob("chunk-*.safetensors"))
    assert 1 <= len(done) < 5 and not list(tmp_path.rglob("meta.json"))
    leftover = next(tmp_path.rglob("latents-*")) / f".chunk-000004.safetensors.{_host()}-{child.pid}.tmp"
    leftover.write_bytes(b"half a chunk")
    reader = kit.ListReader([kit.record(i, f"prompt {i % 4}") for i in range(20)])
    encoder = kit.Encoder()
    build_cache(reader, encoder, tmp_path / "cut", resolution=32, batch_size=8, progress=False)
    assert encoder.num_images == 2 * 4 * (5 - len(done))  # what was done is not done again
    build_cache(reader, kit.Encoder(), tmp_path / "whole", resolution=32, batch_size=8, progress=False)
    assert kit.tree(tmp_path / "cut") == kit.tree(tmp_path / "whole")


def _host():
    from diffalign._atomic import _HOST

    return _HOST


@pytest.mark.parametrize("what", ["latents", "text", "empty", "index", "meta", "report"])
def test_damage_is_found_and_rebuilt(kit, tmp_path, what):
    cache = build_of(kit, tmp_path)
    before = kit.tree(tmp_path)
    patterns = {
        "latents": "chunk-000001*", "text": "text-*/text-*", "empty": "empty*", "index": "index.npy",
        "meta": "meta.json",
    }  # fmt: skip
    victim = next(tmp_path.rglob(patterns.get(what, "report.json")))
    if what == "report":
        victim.unlink()  # no part of what training reads
        assert len(Cache.open(cache.folder)) == 8
        return
    victim.write_bytes(victim.read_bytes()[:-7])
    with pytest.raises(UserError):
        Cache.open(cache.folder)
    encoder = kit.Encoder()
    build_cache(mixed(kit), encoder, tmp_path, batch_size=3, **SETTINGS)
    assert kit.tree(tmp_path) == before
    assert encoder.num_images <= 16  # one chunk at most


def test_altered_bytes_are_found_on_reading_and_on_rebuilding(kit, tmp_path):
    cache = build_of(kit, tmp_path)
    before = kit.tree(tmp_path)
    victim = next(tmp_path.rglob("chunk-000000*"))
    raw = bytearray(victim.read_bytes())
    raw[-20:] = bytes(20 * [77])
    victim.write_bytes(bytes(raw))
    with pytest.raises(UserError, match="chunk-000000.*altered.*delete"):
        for row in range(4):
            cache.batch([row], [True])
            cache.batch([row], [False])
    next(tmp_path.rglob("meta.json")).unlink()
    build_of(kit, tmp_path)
    assert kit.tree(tmp_path) == before


def test_half_precision_overflow_and_nan_are_refused(kit, tmp_path):
    class Loud(kit.Encoder):
        scale = 1e6

        def encode_images(self, pixels):
            mean, std = super().encode_images(pixels)
            return mean * self.scale, std

    reader = kit.ListReader([kit.record(0)])
    with pytest.raises(UserError, match="leave the range of float16.*float32"):
        build_cache(reader, Loud(), tmp_path, resolution=32, progress=False)
    assert len(build_cache(reader, Loud(), tmp_path, resolution=32, dtype="float32", progress=False)) == 1
    Loud.scale = float("nan")
    with pytest.raises(UserError, match="NaN or infinity"):
        build_cache(reader, Loud(), tmp_path / "x", resolution=32, progress=False)
    with pytest.raises(UserError, match="legal: float16, float32"):
        build_cache(reader, kit.Encoder(), tmp_path, resolution=32, dtype="int8", progress=False)


def test_a_full_disk_is_one_clear_line(kit, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="no space left.*the cache needs"):
            build_of(kit, tmp_path / "a")
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("chunk-*"))
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="needs [0-9,]+ bytes more.*1,000 free"):
        build_of(kit, tmp_path / "b")
    assert not list((tmp_path / "b").rglob("*.safetensors"))


def test_the_estimate_is_an_upper_bound_and_close(kit, tmp_path):
    reader, encoder = kit.ListReader([kit.record(i) for i in range(40)]), kit.Encoder()
    size = estimate_cache_bytes(reader, encoder, resolution=32, flip=True)
    numbers = 40 * 2 * 2 * 2 * (4 * 8 * 8) * 2
    assert numbers <= size.latents <= numbers + 40 * 1000 and size.text >= 40 * (8 * 4 + 5) * 2
    build_cache(reader, encoder, tmp_path, resolution=32, flip=True, progress=False)
    written = sum(len(content) for content in kit.tree(tmp_path).values())
    # Headers weigh in tiny caches: with files of 4 records there are many for few numbers.
    assert 0.7 * written < size.total < 1.2 * written + 20_000


def test_memory_stays_flat(kit, tmp_path, monkeypatch):
    import tracemalloc

    monkeypatch.setattr(_latents, "CHUNK", 64)
    monkeypatch.setattr("diffalign.data._build.CHUNK", 64)
    monkeypatch.setattr(_text, "BLOCK", 256)
    base = kit.record(0)

    class Many(kit.ListReader):
        def __len__(self):
            return self.num

        def __getitem__(self, index):
            images = tuple(image + b"%d" % index for image in base.images)  # all different: decoders stop before it
            return type(base)(index, f"prompt {index % 300}", images, base.utility)

    def peak(num):
        reader = Many([], f"{num}")
        reader.num = num
        folder = tmp_path / str(num)
        tracemalloc.start()
        cache = build_cache(reader, kit.Encoder(), folder, resolution=32, dtype="float32", progress=False)
        for start in range(0, num, 50):
            cache.batch(range(start, start + 8))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, sum(path.stat().st_size for path in folder.rglob("chunk-*"))

    (small, _), (large, size) = peak(300), peak(1500)
    assert size > 5_000_000
    assert large < small + 600_000


def test_workers_open_their_own_maps(kit, tmp_path):
    import pickle

    cache = build_of(kit, tmp_path)
    batch = cache.batch([0])
    assert_equal(pickle.loads(pickle.dumps(cache)).batch([0]), batch)


def test_reading_is_fast_enough_to_feed_a_network(kit, tmp_path):
    reader = kit.ListReader([kit.record(i % 4, f"prompt {i % 4}") for i in range(60)])
    cache = build_cache(reader, kit.Encoder(), tmp_path, resolution=32, progress=False)
    cache.batch(range(60))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        cache.batch(range(60))
        times.append(time.perf_counter() - start)
    assert min(times) / 60 < 0.02  # seconds per record; about 0.0005 on an idle core


def test_report_lists_at_most_so_many():
    report = Report(2000)
    for row in range(1500):
        report.add_bad(BadRow("broken image").at("f", row))
    saved = report.as_dict()
    assert saved["bad"] == {"broken image": 1500} and len(saved["rows"]) == 1000 and not saved["is_list_complete"]
