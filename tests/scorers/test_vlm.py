"""The vision-language judge on tiny random Qwen2-VLs: probabilities, ratings, both orders, HPSv3, bad answers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from diffalign.registry import build
from diffalign.scorers import _vlm_questions as questions
from diffalign.scorers._vlm_hpsv3 import fixed_size
from diffalign.types import UserError

from .conftest import pictures
from .tiny_vlm import config, write_vlm

PROMPTS = ["a red circle", "two blue crosses, one above the other", "", "naïve 你好 🙂", "word " * 30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vlm(tmp_path_factory.mktemp("qwen"))


def vlm(folder: Path, **fields: Any) -> Any:
    return build("scorer", {"name": "vlm", "path": str(folder), "device": "cpu", "dtype": "float32", **fields})


def rendered(*parts: str) -> str:
    """One message by the template, by hand; an empty part is a picture."""
    body = "".join(part or "<|vision_start|><|image_pad|><|vision_end|>" for part in parts)
    return f"<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n"


def test_vqascore_is_the_probability_of_yes(folder: Path) -> None:
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    model, made = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    expected = []
    for image, prompt in zip(pictures(side=0), PROMPTS, strict=True):
        text = rendered("", f'Does this figure show "{prompt}"? Please answer yes or no.')
        with torch.no_grad():
            logits = model(**made(text=[text], images=[image], return_tensors="pt")).logits[0, -1]
        expected.append(F.softmax(logits, dim=-1)[made.tokenizer.convert_tokens_to_ids("Yes")].item())
    assert np.std(np.log(expected)) > 0.01
    np.testing.assert_allclose(vlm(folder).score(pictures(side=0), PROMPTS), expected, rtol=1e-5)


def test_scores_depend_neither_on_batch_mates_nor_on_their_order(folder: Path) -> None:
    images = pictures(side=0)
    together = vlm(folder, batch_size=5).score(images, PROMPTS)
    alone = vlm(folder, batch_size=1).score(images, PROMPTS)
    turned = vlm(folder, batch_size=2).score(images[::-1], PROMPTS[::-1])[::-1]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    np.testing.assert_allclose(together, turned, rtol=1e-5)
    assert len(vlm(folder).score([], [])) == 0
    with pytest.raises(ValueError, match="5 images for 1 prompts"):
        vlm(folder).score(images, ["a"])


def test_answers_are_greedy_batched_and_free_of_the_folders_sampling(folder: Path, tmp_path: Path) -> None:
    images = pictures(side=0)
    made = vlm(folder, max_new_tokens=6)
    answers = made.ask(images, PROMPTS)
    assert answers == vlm(folder, max_new_tokens=6, batch_size=1).ask(images, PROMPTS) and len(set(answers)) > 1
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    odd = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0, "eos_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(odd))
    assert vlm(tmp_path, max_new_tokens=6).ask(images, PROMPTS) == answers
    ids = made._chat.inputs([(images[0], PROMPTS[0])])
    model, found = made._chat.model, []
    for _ in range(6):  # one token at a time, from whole forward passes
        with torch.no_grad():
            found.append(int(model(**ids).logits[0, -1].argmax()))
        more = {"input_ids": [[found[-1]]], "attention_mask": [[1]], "mm_token_type_ids": [[0]]}
        ids |= {key: torch.cat([ids[key], torch.tensor(value)], dim=1) for key, value in more.items()}
        if found[-1] == 0:
            break
    assert answers[0] == made._chat.processor.tokenizer.decode(found, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("4", 4),
        (" 5. ", 5),
        ("Rating: 3/5", 3),
        ("I give it 2 out of 5.", 2),
        ("On a scale from 1 to 5, this is a 4", 4),
        ("(1-5): 1", 1),
        ("4.0", 4),
        ("**4**", 4),
        ("4, because 4 of the things are there", 4),
        ("", None),
        ("four", None),
        ("4.5", None),
        ("4 or 5", None),
        ("7", None),
        ("0", None),
        ("-3", None),
        ("1 to 5", None),
        ("3-4", None),
        ("x4y", None),
        ("2024-01-04", None),
    ],
)
def test_an_answer_is_a_whole_number_of_the_scale_or_nan(answer: str, value: float | None) -> None:
    found = questions.whole_number(answer, 1, 5)
    assert math.isnan(found) if value is None else found == value


def test_a_pattern_reads_the_last_match_or_nan() -> None:
    pattern = r"Final Score:\s*(-?\d+(?:\.\d+)?)"
    assert questions.by_pattern("Final Score: 1\nFinal Score: 3.7", pattern, 1, 5) == 3.7
    for answer in ("3.7", "Final Score: high", "Final Score: 9", ""):
        assert math.isnan(questions.by_pattern(answer, pattern, 1, 5))
    assert math.isnan(questions.by_pattern("score ?", r"score (.)", 1, 5))


def scripted(made: Any, reply: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts words into the judge's mouth; returns the questions it was asked."""
    asked: list[str] = []

    def answers(self: Any, contents: Any, max_new_tokens: int) -> list[str]:
        asked.extend(content[-1] for content in contents)
        return [reply(content[-1]) for content in contents]

    monkeypatch.setattr(type(made._chat), "answers", answers)
    return asked


def test_a_rubric_rates_every_aspect_and_has_no_number_for_a_missing_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = vlm(folder, kind="rubric", batch_size=2)
    given = {"prompt-following": "5", "aesthetics": "Rating: 4/5", "fidelity": "2", "harmlessness": "3"}

    def reply(question: str) -> str:
        aspect = next(name for name in given if f"its {name}:" in question)
        return "no idea" if '"two"' in question and aspect == "fidelity" else given[aspect]

    asked = scripted(made, reply, monkeypatch)
    aspects = made.score_aspects(pictures(3), ["one", "two", "three {low}"])
    assert list(aspects) == list(given) and aspects["aesthetics"].tolist() == [4, 4, 4]
    np.testing.assert_array_equal(aspects["fidelity"], [2, np.nan, 2])
    np.testing.assert_array_equal(made.score(pictures(3), ["one", "two", "three"]), [3.5, np.nan, 3.5])
    assert any('"three {low}"' in question and "from 1 (worst) to 5 (best)" in question for question in asked)
    named = vlm(folder, kind="rubric", aspects=("how blue it is",))
    asked = scripted(named, lambda question: "1", monkeypatch)
    assert named.score(pictures(1), ["x"])[0] == 1 and "how blue it is" in asked[0]


def test_a_random_judge_that_babbles_is_all_nan(folder: Path) -> None:
    assert np.isnan(vlm(folder, kind="rubric", max_new_tokens=4).score(pictures(2), PROMPTS[:2])).all()


def test_pointwise_asks_its_template_and_reads_its_pattern(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ask.txt").write_bytes(b"Judge [{prompt}]\r\nend  \n")
    made = vlm(folder, kind="pointwise", template=str(tmp_path / "ask.txt"))
    asked = scripted(made, lambda question: "Final Score: 4.2" if "red" in question else "good", monkeypatch)
    np.testing.assert_allclose(made.score(pictures(2), ["red", "blue"]), [4.2, np.nan])
    assert asked[0] == "Judge [red]\r\nend  \n"  # byte for byte


def test_preferences_do_not_depend_on_the_order(folder: Path) -> None:
    made, images = vlm(folder, batch_size=2), pictures(side=0)
    others = images[1:] + images[:1]
    one, turned = made.prefer(images, others, PROMPTS), made.prefer(others, images, PROMPTS)
    torch.testing.assert_close(one.probability + turned.probability, torch.ones(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(one.mass, turned.mass)
    assert torch.equal(one.disagrees, turned.disagrees) and one.probability.std() > 0
    same = made.prefer(images, images, PROMPTS)
    torch.testing.assert_close(same.probability, torch.full((5,), 0.5), atol=1e-6, rtol=0)
    assert same.disagrees.all()  # it saw one picture twice, and only the places differ
    alone = vlm(folder, batch_size=1).prefer(images, others, PROMPTS)
    torch.testing.assert_close(alone.probability, one.probability, atol=1e-5, rtol=0)
    aspect = made.prefer(images, others, PROMPTS, aspect="aesthetics")
    assert (aspect.probability - one.probability).abs().max() > 1e-6


def test_preferences_are_the_mean_of_both_orders(folder: Path) -> None:
    made = vlm(folder)
    a, b = pictures(2)
    text = questions.choosing("a cat", None)
    letters = [made._chat.token(letter) for letter in "AB"]
    shown = [("Picture A:", a, "Picture B:", b, text), ("Picture A:", b, "Picture B:", a, text)]
    (pa, pb), (qa, qb) = (made._chat.next_token([each])[0, letters].tolist() for each in shown)
    found = made.prefer([a], [b], ["a cat"])
    assert found.probability.item() == pytest.approx((pa / (pa + pb) + qb / (qa + qb)) / 2, rel=1e-5)
    assert found.mass.item() == pytest.approx((pa + pb + qa + qb) / 2, rel=1e-5)
    assert found.disagrees.item() == ((pa > pb) != (qb > qa))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(512, 512, (448, 448)), (1024, 1024, (448, 448)), (768, 768, (420, 420)), (448, 448, (448, 448))],
)
def test_hpsv3_sizes_keep_the_floors_of_floats(height: int, width: int, expected: tuple[int, int]) -> None:
    assert fixed_size(height, width) == expected


def test_hpsv3_sizes_are_multiples_and_narrow_pictures_are_refused() -> None:
    for size in ((1, 1), (64, 64), (1216, 832), (3000, 40), (20000, 20000)):
        found = fixed_size(*size)
        assert all(length % 28 == 0 and length >= 28 for length in found)
    with pytest.raises(ValueError, match="too narrow"):
        fixed_size(20000, 20)


@pytest.fixture(scope="module")
def hpsv3(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny HPSv3 file of the released layout, from before transformers moved the towers, and a template."""
    made, generator = tmp_path_factory.mktemp("hpsv3"), torch.Generator().manual_seed(5)
    weights = {}
    for key, value in load_file(folder / "model.safetensors").items():
        weights[key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")] = value
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[key] = torch.cat([weights[key], torch.randn(1, 64, generator=generator)])
    for index, (out, of) in {0: (1024, 64), 3: (16, 1024), 5: (2, 16)}.items():
        weights[f"rm_head.{index}.weight"] = torch.randn(out, of, generator=generator) / of**0.5
        weights[f"rm_head.{index}.bias"] = torch.randn(out, generator=generator)
    assert {key.split(".")[0] for key in weights} == {"visual", "model", "lm_head", "rm_head"}
    save_file(weights, made / "HPSv3.safetensors")
    (made / "template.txt").write_text("Rate it.\nTextual prompt - {prompt}\nRating: <|Reward|>\n\nEND\n")
    return made


def hps(folder: Path, hpsv3: Path, **fields: Any) -> Any:
    files = {"weights": str(hpsv3 / "HPSv3.safetensors"), "template": str(hpsv3 / "template.txt")}
    return vlm(folder, kind="hpsv3", **{**files, **fields})


def test_hpsv3_is_mu_at_the_reward_token(folder: Path, hpsv3: Path) -> None:
    from transformers import AutoProcessor, Qwen2VLModel

    words, w = AutoProcessor.from_pretrained(folder), load_file(hpsv3 / "HPSv3.safetensors")
    words.tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    sizes = config(words)
    sizes.text_config.vocab_size = len(words.tokenizer)
    model = Qwen2VLModel(sizes).eval()
    model.load_state_dict(
        {key.replace("model.", "language_model."): w[key] for key in w if key.startswith(("model.", "visual."))}
    )
    expected = []
    for image, prompt in zip(pictures(side=0)[:3], PROMPTS[:3], strict=True):
        height, width = fixed_size(image.height, image.width)
        text = rendered("", f"Rate it.\nTextual prompt - {prompt}\nRating: <|Reward|>\n\nEND\n")
        inputs = words(text=[text], images=[image.resize((width, height), 3)], return_tensors="pt", do_resize=False)
        with torch.no_grad():
            states = model(**inputs).last_hidden_state[0]
        hidden = states[inputs["input_ids"][0].tolist().index(len(words.tokenizer) - 1)]
        hidden = F.relu(F.linear(hidden, w["rm_head.0.weight"], w["rm_head.0.bias"]))
        hidden = F.relu(F.linear(hidden, w["rm_head.3.weight"], w["rm_head.3.bias"]))
        expected.append(F.linear(hidden, w["rm_head.5.weight"], w["rm_head.5.bias"])[0].item())
    made = hps(folder, hpsv3, batch_size=3)
    scores = made.score(pictures(side=0)[:3], PROMPTS[:3])
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    alone = hps(folder, hpsv3, batch_size=1).score(pictures(side=0)[:3], PROMPTS[:3])
    np.testing.assert_allclose(scores, alone, rtol=1e-5, atol=1e-5)
    assert made._hpsv3.network.head[0].weight.dtype == torch.float32
    half = hps(folder, hpsv3, dtype="bfloat16")
    assert np.isfinite(half.score(pictures(1), PROMPTS[:1])).all()
    assert half._hpsv3.network.head[0].weight.dtype == torch.float32
    assert half._hpsv3.network.model.dtype == torch.bfloat16


def test_prompts_with_control_tokens_are_refused(folder: Path, hpsv3: Path) -> None:
    for made, token in ((vlm(folder), "<|image_pad|>"), (hps(folder, hpsv3), "<|Reward|>")):
        with pytest.raises(ValueError, match="control token"):
            made.score(pictures(1), [f"a cat {token}"])
    with pytest.raises(ValueError, match="control token"):
        vlm(folder).prefer(pictures(1), pictures(1), ["<|im_end|>"])


def test_wrong_settings_and_files_are_one_line(folder: Path, hpsv3: Path, clip_folder: Path, tmp_path: Path) -> None:
    def said(**fields: Any) -> str:
        path = fields.pop("path", folder)
        with pytest.raises(UserError) as error:
            vlm(path, **fields).score(pictures(1), PROMPTS[:1])
        assert "\n" not in str(error.value)
        return str(error.value)

    template, weights = str(hpsv3 / "template.txt"), str(hpsv3 / "HPSv3.safetensors")
    assert "vlm.template" in said(kind="hpsv3", weights=weights)
    assert "vlm.weights" in said(kind="hpsv3", template=template)
    assert "vlm.weights" in said(weights=weights)
    assert "vlm.template" in said(kind="pointwise")
    assert "own questions" in said(kind="rubric", template=template)
    assert "regular expression" in said(pattern="(")
    assert "group" in said(pattern=r"\d")
    assert "rising" in said(scale=(5, 1))
    assert "empty" in said(aspects=())
    assert "no such folder" in said(path=tmp_path / "none")
    assert "no processor" in said(path=tmp_path) or "chat" in said(path=tmp_path)
    (tmp_path / "t.txt").write_text("no slot <|Reward|>")
    assert "{prompt}" in said(kind="hpsv3", weights=weights, template=str(tmp_path / "t.txt"))
    (tmp_path / "t.txt").write_text("{prompt} and no token")
    assert "<|Reward|>" in said(kind="hpsv3", weights=weights, template=str(tmp_path / "t.txt"))
    wrong = str(clip_folder / "model.safetensors")
    assert "not a checkpoint" in said(kind="hpsv3", weights=wrong, template=template)


def test_the_version_holds_all_that_changes_a_score(folder: Path, hpsv3: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("{prompt}?")
    made = [
        vlm(folder),
        vlm(folder, dtype="bfloat16"),
        vlm(folder, template=str(tmp_path / "t.txt")),
        vlm(folder, kind="rubric"),
        vlm(folder, kind="rubric", scale=(1, 10)),
        vlm(folder, kind="rubric", aspects=("fidelity",)),
        vlm(folder, kind="pointwise", template=str(tmp_path / "t.txt")),
        hps(folder, hpsv3),
    ]
    assert len({each.info.version for each in made}) == len(made)
    assert made[0].info == vlm(folder, batch_size=1, pattern="(x)").info  # which change nothing here
    assert made[0].info.name == "vlm_vqascore" and not made[0].info.differentiable
