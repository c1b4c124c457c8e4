"""Best-of-N and potential search: who is kept, what is never evaluated again, and what is counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign.config import Sampling
from diffalign.randomness import address
from diffalign.recipes._images import sample_images
from diffalign.recipes.generate._select import selection_of
from diffalign.recipes.generate._select_paths import best
from diffalign.recipes.generate._select_pictures import Chooser
from diffalign.schedule import schedule_from_config
from diffalign.sections import Generate
from diffalign.types import ScorerInfo, UserError

NAN = float("nan")
PROMPTS, NUMBERS = ["a red thing", "a blue thing", "two things"], [0, 1, 0]
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
SCHEDULES = {
    "flow": schedule_from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}),
    "vp": schedule_from_config({"_class_name": "DDIMScheduler", **BETAS, "steps_offset": 1}),
}


class Toy:
    """A network of one line on 4 x 4 latents that are pixels; it counts the rows it was asked about."""

    resolution = (4, 4)
    device = torch.device("cpu")
    users = None
    vae_factor, latent_channels = 1, 3

    def __init__(self, kind: str = "flow") -> None:
        self.schedule = SCHEDULES[kind]
        self.calls: list[Tensor] = []

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height, width

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"text": torch.tensor([[address(prompt) % 7 / 7] for prompt in prompts])}

    def empty_prompt(self) -> dict[str, Tensor]:
        return {"text": torch.zeros(1, 1)}

    def size_cond(self, original: Tensor, crop: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"size": original.float()}

    def __call__(self, xt: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        assert len(xt) == len(t) == len(cond["text"]) == len(cond["size"])
        self.calls.append(xt.clone())
        return 0.4 * xt + 0.2 * cond["text"][:, :, None, None] + 0.1 * t[:, None, None, None]

    def decode(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(latents)


@dataclass
class Bright:
    """Mean brightness of a picture, read from its pixels; NaN above `nan_above`."""

    nan_above: float = math.inf
    asked: ClassVar[list[tuple[int, str]]] = []  # (pictures, first prompt) of each call
    info: ClassVar[ScorerInfo] = ScorerInfo("bright", "1", ("image",), "grey level", (0.0, 1.0))

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        self.asked.append((len(images), prompts[0]))
        values = np.array([np.asarray(image).mean() / 255 for image in images])
        return np.where(values > self.nan_above, NAN, values)


@dataclass
class Timed:
    """A step-aware scorer that remembers the times it was told; dark is good."""

    told: ClassVar[list[float]] = []
    info: ClassVar[ScorerInfo] = ScorerInfo("timed", "1", ("image", "timestep"), "grey level", (0.0, 1.0))
    calls: int = field(default=0, init=False)

    def score_tensor(self, pixels: Tensor, prompts: Sequence[str], timestep: Tensor) -> Tensor:
        self.told.append(float(timestep[0]))
        return -pixels.mean(dim=(1, 2, 3))

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        raise AssertionError("previews carry a time")


BRIGHT = {"name": "test_select:Bright"}


@pytest.fixture(autouse=True)
def forgotten():
    Bright.asked.clear()
    Timed.told.clear()


def chooser(model: Toy, select: Any = "best-of-n", n: int = 4, sampling: Any = None, **settings: Any) -> Chooser:
    how = Generate(select=select, candidates=n, scorers=({**BRIGHT},), images_per_prompt=2, seed=3, **settings)
    sampling = sampling or Sampling(num_steps=10, cfg_scale=3.0, batch_size=16)
    chosen = selection_of(how)
    assert chosen is not None
    return Chooser(model, how, sampling, *chosen, None)


def all_candidates(n: int, sampling: Sampling, kind: str = "flow") -> list[np.ndarray]:
    """[N, H, W, 3] of each picture, by plain sampling."""
    return [
        sample_images(Toy(kind), [text] * n, [k + c * 2 for c in range(n)], 3, sampling)
        for text, k in zip(PROMPTS, NUMBERS, strict=True)
    ]


@pytest.mark.parametrize("kind", ["flow", "vp"])
def test_best_of_one_is_plain_sampling_bit_for_bit(kind):
    sampling = Sampling(num_steps=10, cfg_scale=3.0)
    made = chooser(Toy(kind), n=1, sampling=sampling)(PROMPTS, NUMBERS)
    plain = sample_images(Toy(kind), PROMPTS, NUMBERS, 3, sampling)
    for (pixels, facts), expected in zip(made, plain, strict=True):
        assert (pixels == expected).all() and pixels.dtype == expected.dtype
        assert facts["evaluations"] == facts["evaluations_best_of_n"] == 20
    assert [facts["candidate"] for _, facts in made] == NUMBERS


@pytest.mark.parametrize("kind", ["flow", "vp"])
@pytest.mark.parametrize("batch_size", [16, 5, 1])
def test_best_of_n_keeps_the_brightest_of_what_plain_sampling_makes(kind, batch_size):
    sampling = Sampling(num_steps=6, cfg_scale=3.0, batch_size=batch_size)
    made = chooser(Toy(kind), sampling=sampling)(PROMPTS, NUMBERS)
    for (pixels, facts), k, pictures in zip(made, NUMBERS, all_candidates(4, sampling, kind), strict=True):
        winner = int(pictures.reshape(4, -1).mean(axis=1).argmax())
        assert facts["candidate"] == k + 2 * winner
        assert (pixels == pictures[winner]).all()
        assert facts["score"] == facts["scores"]["test_select:Bright"] == pytest.approx(pixels.mean() / 255)
        assert facts["judged"] == {"outcome": 4} and facts["finished"] == 4


def test_more_candidates_hold_those_of_fewer():
    scores = [[facts["score"] for _, facts in chooser(Toy(), n=n)(PROMPTS, NUMBERS)] for n in (1, 2, 4, 8)]
    assert all(a <= b for few, many in zip(scores, scores[1:], strict=False) for a, b in zip(few, many, strict=True))


def test_equal_scores_go_to_the_lower_number_and_nan_never_wins():
    among = np.array([True, True, False, True])
    assert best(np.array([0.5, 0.7, 0.9, 0.7]), among, 1).tolist() == [False, True, False, False]
    assert best(np.array([-np.inf, -np.inf, 1.0, -np.inf]), among, 2).tolist() == [True, True, False, False]
    pictures = all_candidates(4, Sampling(num_steps=10, cfg_scale=3.0))
    grey = pictures[0].reshape(4, -1).mean(axis=1) / 255
    limit = np.sort(grey)[1:3].mean()  # the two brightest have no score
    some = ({**BRIGHT, "nan_above": limit},)
    how = Generate(select="best-of-n", candidates=4, scorers=some, seed=3, images_per_prompt=2)
    chosen = selection_of(how)
    assert chosen is not None
    model = Chooser(Toy(), how, Sampling(num_steps=10, cfg_scale=3.0), *chosen, None)
    (pixels, facts), *_ = model(PROMPTS, NUMBERS)
    assert facts["score"] == pytest.approx(np.sort(grey)[1]) and (pixels == pictures[0][grey.argsort()[1]]).all()


def test_without_any_score_the_first_candidate_is_kept_and_said_to_be_unjudged():
    how = Generate(select="best-of-n", scorers=({**BRIGHT, "nan_above": -1.0},), images_per_prompt=2)
    chosen = selection_of(how)
    assert chosen is not None
    made = Chooser(Toy(), how, Sampling(num_steps=4), *chosen, None)(PROMPTS, NUMBERS)
    assert [facts["candidate"] for _, facts in made] == NUMBERS
    assert all(facts["score"] is None and facts["scores"] == {"test_select:Bright": None} for _, facts in made)


@pytest.mark.parametrize("kind", ["flow", "vp"])
def test_parm_with_an_open_gate_and_no_pruning_is_best_of_n(kind):
    plain = chooser(Toy(kind))(PROMPTS, NUMBERS)
    gate = {"name": "parm", "checks": [0.3, 0.6], "keep": [1.0], "clarity": [{**BRIGHT}], "clear_from": 0.0}
    searched = chooser(Toy(kind), select=gate)(PROMPTS, NUMBERS)
    for (a, fa), (b, fb) in zip(plain, searched, strict=True):
        assert (a == b).all() and fa["candidate"] == fb["candidate"]
        assert fa["evaluations"] == fb["evaluations"] == 4 * 10 * 2
        assert fb["judged"] == {"clarity": 4, "potential": 4, "outcome": 4}


@pytest.mark.parametrize("scale,per_step", [(3.0, 2), (1.0, 1)])
@pytest.mark.parametrize("share,keep,n", [(0.5, 0.25, 8), (0.3, 0.5, 4), (0.5, 0.25, 3)])
def test_what_is_given_up_is_never_evaluated_again(scale, per_step, share, keep, n):
    model = Toy()
    sampling = Sampling(num_steps=10, cfg_scale=scale, batch_size=7)
    made = chooser(model, {"name": "parm", "checks": [share], "keep": [keep]}, n, sampling)(PROMPTS, NUMBERS)
    before, left = round(share * 10), math.ceil(keep * n)
    formula = per_step * (n * before + left * (10 - before))  # N S (f + q (1 - f))
    assert [facts["evaluations"] for _, facts in made] == [formula] * 3
    assert sum(len(call) for call in model.calls) == 3 * formula  # what the network really did
    assert max(len(call) for call in model.calls) <= 7 * per_step
    assert all(facts["finished"] == left and facts["judged"]["potential"] == n for _, facts in made)


def test_the_search_keeps_the_candidates_whose_previews_promise_most():
    made = chooser(Toy(), {"name": "parm", "checks": [0.5], "keep": [0.25]}, 8)(PROMPTS, NUMBERS)
    whole = chooser(Toy(), n=8)(PROMPTS, NUMBERS)
    # in this toy world a preview's brightness orders the finished pictures
    assert [facts["candidate"] for _, facts in made] == [facts["candidate"] for _, facts in whole]
    assert all((a[0] == b[0]).all() for a, b in zip(made, whole, strict=True))


def test_step_aware_judges_are_told_the_time_of_the_preview():
    model = Toy()
    select = {"name": "parm", "checks": [0.2, 0.5], "potential": [{"name": "test_select:Timed"}], "ask_again": True}
    made = chooser(model, select)(PROMPTS, NUMBERS)
    times = model.schedule.timesteps(10)
    expected = [float(model.schedule.network_time(torch.tensor(times[i][0]))) for i in (1, 4)]
    assert Timed.told == pytest.approx(expected)
    assert all(facts["judged"]["potential"] == 4 + 1 for _, facts in made)  # keep 0.25 of 4: one is asked again


# Reflection


def never(image: Image.Image, prompt: str) -> str | None:
    return None


def more(image: Image.Image, prompt: str) -> str | None:
    assert image.size == (4, 4) and prompt in PROMPTS
    return f"{prompt}, please" if prompt == PROMPTS[0] else None


def wrong(image: Image.Image, prompt: str) -> Any:
    return 3


def test_reflection_samples_a_revised_prompt_and_keeps_the_better_picture():
    plain = chooser(Toy())(PROMPTS, NUMBERS)
    calm = chooser(Toy(), {"name": "best-of-n", "reflect": "test_select:never"})(PROMPTS, NUMBERS)
    assert all((a[0] == b[0]).all() for a, b in zip(plain, calm, strict=True))
    Bright.asked.clear()
    revised = chooser(Toy(), {"name": "best-of-n", "reflect": "test_select:more", "reflections": 2})(PROMPTS, NUMBERS)
    other = sample_images(Toy(), [f"{PROMPTS[0]}, please"] * 4, [0, 2, 4, 6], 3, Sampling(num_steps=10, cfg_scale=3.0))
    brightest = max(plain[0][1]["score"], float((other.reshape(4, -1).mean(axis=1) / 255).max()))
    facts = revised[0][1]
    assert facts["score"] == pytest.approx(brightest)
    assert facts["evaluations"] == 3 * 80 and facts["reflections"] == 2 and facts["judged"]["reflection"] == 2
    assert ("sampled_prompt" in facts) == (facts["score"] > plain[0][1]["score"])
    assert {prompt for _, prompt in Bright.asked} <= set(PROMPTS)  # judged by what the user asked for
    assert revised[1][1] == {**plain[1][1], "judged": {"outcome": 4, "reflection": 1}, "reflections": 0}


def test_a_missing_tiny_decoder_and_a_wrong_hook_are_told_by_their_keys():
    with pytest.raises(UserError, match=r"generate\.select\.preview=nowhere"):
        chooser(Toy(), {"name": "parm", "preview": "nowhere"})
    with pytest.raises(UserError, match=r"generate\.select\.reflect=test_select:wrong: must return text"):
        chooser(Toy(), {"name": "best-of-n", "reflect": "test_select:wrong"})(PROMPTS, NUMBERS)
