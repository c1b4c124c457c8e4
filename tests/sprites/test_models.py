"""The embedded models: ordinary diffusers pipelines, small, and good enough that there is something to align."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from diffalign.sprites import MODELS, model_path
from diffalign.sprites.build import TOKENS
from diffalign.sprites.judge import judge
from diffalign.sprites.measure import load, sample, stamp, summarise
from diffalign.sprites.render import render
from diffalign.sprites.scene import KINDS, all_captions, caption, prompts, sample_scene

LIMIT_BYTES = 8_000_000
# Guards against broken weights, below what the stamps say (single objects right: see training.json).
FLOOR = {"sdxl": 0.75, "sd3": 0.6}


@pytest.fixture(scope="module", params=MODELS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(family):
    return load(model_path(family))


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="no embedded sprites model"):
        model_path("sd15")


def test_the_folder_is_small_and_holds_safetensors_only(family):
    files = [path for path in model_path(family).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT_BYTES
    assert not [path.name for path in files if path.suffix not in {".safetensors", ".json", ".txt"}]


def test_plain_diffusers_loads_it_without_being_told_the_class(family):
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}  # diffusers' way without T5
    loaded = DiffusionPipeline.from_pretrained(model_path(family), **absent)
    assert type(loaded).__name__ == {"sdxl": "StableDiffusionXLPipeline", "sd3": "StableDiffusion3Pipeline"}[family]


def test_every_word_of_the_grammar_is_one_token(pipeline):
    rng = np.random.default_rng(0)
    texts = [caption(sample_scene(rng, kind)) for kind in KINDS for _ in range(100)]
    texts += [text for kind in ("single", "count", "open") for text in all_captions(kind)]
    for words in (pipeline.tokenizer, pipeline.tokenizer_2):
        assert words.model_max_length == TOKENS
        for ids, text in zip(words(texts).input_ids, texts, strict=True):
            assert len(ids) == len(text.split()) + 2 <= TOKENS
            assert ids[0] == words.bos_token_id and ids[-1] == words.eos_token_id
    assert len({tuple(ids) for ids in pipeline.tokenizer(texts).input_ids}) == len(set(texts))


def test_the_vae_keeps_what_the_judge_sees(pipeline):
    rng, vae = np.random.default_rng(1), pipeline.vae
    scenes = [sample_scene(rng) for _ in range(64)]
    pixels = torch.from_numpy(np.stack([np.asarray(render(scene, rng)) for scene in scenes])).permute(0, 3, 1, 2)
    with torch.no_grad():
        restored = vae.decode(vae.encode(pixels / 127.5 - 1).latent_dist.mean).sample
    restored = (restored.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    right = sum(judge(picture, caption(scene)).correct for picture, scene in zip(restored, scenes, strict=True))
    assert right / len(scenes) >= 0.9


def test_samples_are_a_function_of_the_seed_alone(pipeline):
    texts = prompts(3, 0, "heldout", "single")
    together = sample(pipeline, texts, seed=5, steps=3)
    alone = sample(pipeline, texts[1:2], seed=6, steps=3)
    gap = np.abs(np.asarray(together[1], np.int16) - np.asarray(alone[0], np.int16))
    assert gap.max() <= 2  # the batch's size may change the last bits of a sum
    assert np.abs(np.asarray(together[0], np.int16) - np.asarray(together[2], np.int16)).max() > 2


@pytest.mark.slow
def test_held_out_captions_come_out(family, pipeline):
    texts = {kind: prompts(32, 0, "heldout", kind) for kind in ("single", "two")}
    verdicts = {
        kind: summarise([judge(*pair) for pair in zip(sample(pipeline, asked, seed=11), asked, strict=True)])
        for kind, asked in texts.items()
    }
    assert verdicts["single"]["correct"] >= FLOOR[family]
    assert verdicts["single"]["attributes"]["background"] >= 0.9
    assert verdicts["two"]["correct"] < verdicts["single"]["correct"]  # what alignment is for
    assert 0.5 < verdicts["two"]["score"] < 0.98


def test_the_stamp_says_how_it_was_made_and_judged(family):
    values = json.loads((model_path(family) / "training.json").read_text())
    assert {"seed", "steps", "seconds", "loss"} <= set(values)
    judged = values["judged"]
    assert set(judged["kinds"]) == set(KINDS) and judged["split"] == "heldout"
    assert judged["kinds"]["single"]["correct"] >= FLOOR[family]
    assert judged["kinds"]["two"]["correct"] < judged["kinds"]["single"]["correct"]


def test_a_stamp_keeps_what_training_wrote(tmp_path):
    (tmp_path / "training.json").write_text('{"seed": 3}')
    verdict = judge(np.zeros((64, 64, 3), np.uint8), "a circle on a dark background")
    stamp(tmp_path, {"kinds": {"open": summarise([verdict, verdict])}})
    values = json.loads((tmp_path / "training.json").read_text())
    assert values["seed"] == 3 and values["judged"]["kinds"]["open"]["pictures"] == 2
    assert values["judged"]["kinds"]["open"]["attributes"]["background"] == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["training.json"]
