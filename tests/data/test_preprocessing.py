"""Decoding, buckets and crops against closed forms and the published bucket list of SDXL."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffalign.data import BadRow
from diffalign.data._encode import Plan, prepare
from diffalign.data._images import bucket_sizes, check_size, choose_bucket, decode, fit, probe
from diffalign.types import UserError

# SDXL report (arXiv 2307.01952), appendix I: heights of at most the width, as (height, width).
SDXL = {
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600), (640, 1536),
    (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152), (896, 1152), (896, 1088),
    (960, 1088), (960, 1024), (1024, 1024),
}  # fmt: skip


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_aspect_buckets_at_1024_are_buckets_of_sdxl():
    sizes = bucket_sizes(1024, "aspect", 8)
    assert {size for size in sizes if size[0] <= size[1]} <= SDXL and len(sizes) == 17
    assert {(w, h) for h, w in sizes} == set(sizes)
    assert (1024, 1024) in sizes and (512, 2048) in sizes and (1216, 832) in sizes


@given(resolution=st.sampled_from([256, 512, 768, 1024, 64, 32, 96]), factor=st.sampled_from([2, 4, 8]))
def test_buckets_fit_the_area_and_the_multiple(resolution, factor):
    multiple = 64 if resolution >= 256 else 4 * factor
    for height, width in bucket_sizes(resolution, "aspect", factor):
        assert height % multiple == width % multiple == 0
        short = min(height, width)
        assert height * width <= resolution**2 < (max(height, width) + multiple) * short
        assert max(height, width) / short <= 4


def test_square_takes_a_rectangle_and_refuses_what_the_vae_cannot_do():
    assert bucket_sizes(512, "square", 8) == ((512, 512),)
    assert bucket_sizes([384, 640], "square", 8) == ((384, 640),)
    with pytest.raises(UserError, match="multiples of 8"):
        bucket_sizes(500, "square", 8)
    with pytest.raises(UserError, match="legal: square, aspect"):
        bucket_sizes(512, "round", 8)
    with pytest.raises(UserError, match="too small"):
        bucket_sizes(8, "aspect", 8)


def test_all_candidates_share_the_bucket_nearest_to_the_mean_log_aspect(kit):
    buckets = ((32, 128), (64, 64), (128, 32))
    assert [choose_bucket([size], buckets) for size in ((30, 100), (50, 70), (100, 20))] == [0, 1, 2]
    assert choose_bucket([(10, 40), (40, 10)], buckets) == 1  # opposite aspects: log aspects cancel
    assert choose_bucket([(10, 40), (10, 40), (40, 10)], buckets) == 1
    encoder = kit.Encoder()
    plan = Plan.of(encoder, 64, "aspect", False, "float32")
    record = kit.record(0, num=3)
    record = type(record)(
        1, "p", (kit.picture(1, (40, 120)), kit.picture(2, (40, 110)), kit.picture(3, (50, 50))), (2, 1, 0)
    )
    ready = prepare(record, plan)
    height, width = plan.buckets[ready.bucket]
    assert ready.pixels.shape == (3, 3, height, width) and width > height
    assert ready.original.tolist() == [[40, 120], [40, 110], [50, 50]]


@settings(deadline=None)
@given(h=st.integers(16, 90), w=st.integers(16, 90), th=st.sampled_from([16, 32, 48]), tw=st.sampled_from([16, 32, 48]))
def test_crop_covers_centrally_and_mirrors(h, w, th, tw):
    rng = np.random.default_rng(h * 100 + w)
    image = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
    pixels, (top, left, mirrored_left) = fit(image, (th, tw))
    assert pixels.shape == (3, th, tw) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
    scale = max(th / h, tw / w)
    rh, rw = max(th, round(h * scale)), max(tw, round(w * scale))
    assert th == rh or tw == rw  # one side fits exactly
    assert 0 <= top and 0 <= left and rw - tw == left + mirrored_left and 0 <= mirrored_left - left <= 1
    assert abs(2 * top - (rh - th)) <= 1
    resized = np.asarray(image.resize((rw, rh), Image.Resampling.LANCZOS))
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), resized[top : top + th, left : left + tw])
    mirror = resized[:, ::-1][top : top + th, mirrored_left : mirrored_left + tw]
    assert np.array_equal(pixels.flip(-1).permute(1, 2, 0).numpy(), mirror)


def test_no_resize_leaves_the_pixels_alone():
    raw = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    pixels, crop = fit(Image.fromarray(raw), (32, 32))
    assert crop == (0, 8, 8) and np.array_equal(pixels.permute(1, 2, 0).numpy(), raw[:, 8:40])


def test_shrinking_is_antialiased():
    board = np.indices((64, 64)).sum(0) % 2 * 255
    pixels, _ = fit(Image.fromarray(np.stack([board.astype(np.uint8)] * 3, -1)), (16, 16))
    assert (pixels.float() - 127.5).abs().max() < 3


def test_modes_become_rgb():
    layer = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    layer.paste((0, 0, 255, 255), (0, 0, 10, 20))
    layer.paste((0, 0, 0, 128), (0, 0, 1, 1))
    found = decode(encoded(layer))
    assert found.mode == "RGB"
    assert found.getpixel((15, 5)) == (255, 255, 255) and found.getpixel((5, 5)) == (0, 0, 255)
    assert found.getpixel((0, 0)) == (127, 127, 127)  # half transparent black over white
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30] + [0] * 762)
    assert decode(encoded(palette)).getpixel((3, 3)) == (10, 200, 30)
    assert decode(encoded(palette, transparency=1)).getpixel((3, 3)) == (255, 255, 255)
    assert decode(encoded(Image.new("L", (20, 20), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert decode(encoded(Image.new("CMYK", (20, 20), (0, 0, 0, 0)), "JPEG")).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((20, 20), 32896, np.uint16))
    assert decode(encoded(deep)).getpixel((0, 0)) == (128, 128, 128)


def test_exif_orientation_turns_the_image_and_its_size():
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 20, 20))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the left half comes to the top
    data = encoded(image, "JPEG", exif=exif, quality=95)
    assert probe(data) == (40, 20)
    found = decode(data)
    assert (found.height, found.width) == (40, 20)
    assert found.getpixel((10, 5))[0] > 200 and found.getpixel((10, 35))[0] < 50


def test_truncated_and_broken_bytes(kit):
    for form in ("JPEG", "PNG", "WEBP"):
        data = kit.picture(3, (64, 64), form)
        assert probe(data) == (64, 64)
        with pytest.raises(BadRow) as caught:
            decode(data[: len(data) * 6 // 10])
        assert caught.value.reason in ("truncated image", "broken image")
    for data in (b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\0" * 40):
        with pytest.raises(BadRow, match="broken image"):
            probe(data)


def test_a_decompression_bomb_is_an_absurd_size(monkeypatch, kit):
    data = kit.picture(1, (64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadRow, match="absurd size"):
        probe(data)
    with pytest.raises(BadRow, match="absurd size: 300 x 64"):
        check_size((64, 300), 16, 256)
