"""Laws that every file in objectives/ must obey, including files added later; mutants show that the laws bite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.registry import build, names
from diffalign.types import Baseline, Likelihoods, LossOutput, Maps

Objective = Callable[[Likelihoods], LossOutput]

# Slots of a file that are worth their own run of every law; a file without an entry runs with its defaults.
VARIANTS: dict[str, dict[str, Any]] = {
    "pair": {"name": "pair", "beta": 50},
    "pair split beta": {"name": "pair", "beta": 50, "beta_loser": 5},
    "pair hinge": {"name": "pair", "beta": 50, "link": "hinge"},
    "pair square": {"name": "pair", "beta": 0.5, "link": "square"},
    "pair smooth": {"name": "pair", "beta": 50, "labels": "smooth", "flip_rate": 0.1},
    "pair robust": {"name": "pair", "beta": 50, "labels": "robust", "flip_rate": 0.1},
    "pair soft": {"name": "pair", "beta": 50, "labels": "soft", "temperature": 0.3},
    "pair forward kl": {"name": "pair", "beta": 50, "divergence": "forward-kl", "nats": 2.0},
    "pair js": {"name": "pair", "beta": 50, "divergence": "js", "nats": 2.0},
    "pair alpha": {"name": "pair", "beta": 50, "divergence": "alpha", "nats": 2.0},
    "pair poly": {"name": "pair", "beta": 50, "poly": 4.0},
    "pair poly below": {"name": "pair", "beta": 50, "poly": -1.0},
    "pair scaled": {"name": "pair", "beta": 5, "labels": "scaled", "temperature": 0.3},
    "pair tdpo2": {"name": "pair", "beta": 50, "kl_correction": 0.5},
    "pair modpo": {"name": "pair", "beta": 50, "score_weights": {"judge": 0.4}},
    "pair dpo-gamma": {"name": "pair", "beta": 50, "reference_strength": 0.5},
    "pair simpo": {"name": "pair", "beta": 50, "reference_strength": 0, "margin": 0.5},
    "sum": {"name": "sum", "terms": [{"name": "pair", "beta": 50}, {"name": "sft", "weight": 0.1}]},
}
VARIANTS |= {
    "sparse_po": {"name": "sparse_po", "beta": 50},
    "sparse_po of data": {"name": "sparse_po", "beta": 50, "mask": "data", "kl_correction": 0},
    "sparse_po tdpo1": {"name": "sparse_po", "beta": 50, "mask": "none", "kl_correction": 1},
    "safeguarded_pair": {"name": "safeguarded_pair", "beta": 50, "mu": 0.5},
    "safeguarded_pair fully": {"name": "safeguarded_pair", "beta": 50, "mu": 1},
    "kto class means": {"name": "kto", "zero_point": "class-means"},
    "kto of the batch": {"name": "kto", "zero_from": "batch"},
    "bco of the batch": {"name": "bco", "shift": "batch"},
    "sum of candidates": {
        "name": "sum",
        "terms": [
            {"name": "pair", "beta": 50, "candidates": [0, 1]},
            {"name": "pair", "beta": 50, "candidates": [1, 0]},
        ],
    },
}
VARIANTS |= {
    "pair ratio clip": {"name": "pair", "beta": 50, "ratio_clip": 0.1},
    "pair ratio clip square": {"name": "pair", "beta": 0.5, "link": "square", "ratio_clip": 0.1},
    "grpo leave-one-out": {"name": "grpo", "advantages": "leave-one-out", "max_advantage": None},
    "grpo wide": {"name": "grpo", "clip": 0.2},
    "nft of a fixed scale": {"name": "nft", "beta": 0.1, "scale": 0.3},
    "nft of probabilities": {"name": "nft", "utility": "probability"},
    "seppo indicator": {"name": "seppo", "beta": 50, "flip": "indicator"},
    "seppo none": {"name": "seppo", "beta": 50, "flip": "none"},
    "explore": {"name": "explore", "beta": 50},
}
VARIANTS |= {name: {"name": name} for name in names("objective") if name not in VARIANTS}


@dataclass(frozen=True)
class TwoDraws:
    """An objective that is shown two draws, of which the given numbers are the mean."""

    objective: Any

    @property
    def needs(self) -> frozenset[str]:
        return self.objective.needs

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        gap = 0.5 * (likelihoods.logratio - likelihoods.logratio.mean(dim=1, keepdim=True))
        draws = tuple(replace(likelihoods, logp=likelihoods.logp + sign * gap) for sign in (1, -1))
        return self.objective(replace(likelihoods, draws=draws))


@dataclass(frozen=True)
class OnMaps(TwoDraws):
    """An objective that is shown pixels whose mean is the given likelihood, the same pattern in every image."""

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        pattern = torch.tensor([[0.2, 1.8], [1.5, 0.5]], dtype=likelihoods.logp.dtype)

        def spread(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values[:, :, None, None] * pattern

        activation = pattern.expand(*likelihoods.logp.shape, 2, 2)
        maps = Maps(*map(spread, (likelihoods.logp, likelihoods.logp_ref, likelihoods.kl)), activation, activation)
        return self.objective(replace(likelihoods, maps=maps))


@dataclass(frozen=True)
class OnOverlap(TwoDraws):
    """An objective that is shown residuals of one direction, as long as the errors say."""

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        length = likelihoods.error.detach().clamp(min=0).sqrt()
        return self.objective(replace(likelihoods, overlap=length[:, :, None] * length[:, None, :]))


@dataclass(frozen=True)
class OnAdvantages(TwoDraws):
    """An objective that is shown advantages, of both signs, in place of utilities in [0, 1]."""

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        return self.objective(replace(likelihoods, utility=2 * likelihoods.utility - 1))


OBJECTIVES: dict[str, Any] = {name: build("objective", spec) for name, spec in VARIANTS.items()}
for squared in ("pair square", "sppo"):
    OBJECTIVES[f"{squared} of two draws"] = TwoDraws(OBJECTIVES[squared])
for name in ("sparse_po", "sparse_po of data", "sparse_po tdpo1"):
    OBJECTIVES[name] = OnMaps(OBJECTIVES[name])
for name in ("safeguarded_pair", "safeguarded_pair fully"):
    OBJECTIVES[name] = OnOverlap(OBJECTIVES[name])
OBJECTIVES["grpo given"] = OnAdvantages(build("objective", {"name": "grpo", "advantages": "given"}))
every = pytest.mark.parametrize("name", OBJECTIVES)

# Past their target or optimum these push back, on purpose, or saturate to an exact 0: the sign law holds for them near
# the reference only (sppo's target lies 1e-4 away, grpo's clip 1e-4).
KTO = {"kto", "kto class means", "kto of the batch"}
GRPO = {"grpo", "grpo leave-one-out", "grpo given"}
CLIPPED = {"pair ratio clip", "pair ratio clip square"}
NEAR = {"pair square", "pair square of two draws", "pair smooth", "pair soft", "pair hinge", "exo", "nca", "mapo"}
NEAR |= KTO | CLIPPED | {"grpo wide"}
SCALE = dict.fromkeys(NEAR, 1e-4) | {"nca": 2e-5, "sppo": 1e-6, "sppo of two draws": 1e-6} | dict.fromkeys(GRPO, 1e-6)
# Pointwise by nature: one constant on both rewards changes them.
POINTWISE = {"sum", "sft", "bco", "nca", "sppo", "sppo of two draws", "poft", "orpo", "asft", "mapo"} | KTO | GRPO
POINTWISE |= {"grpo wide", "seppo", "seppo indicator", "explore"}
ONE_SIDED = {"sft", "poft", "safeguarded_pair fully"}  # they move the best only
# They know no sides, or (seppo) take the worse image for another good one while the policy is behind its reference.
SIDELESS = {"kl", "explore", "seppo"}
# A reward that is no linear function of the log-ratio.
NONLINEAR = {"pair forward kl", "pair js", "pair alpha"} | CLIPPED


def random_likelihoods(
    seed: int, needs: frozenset[str] = frozenset({"pair"}), num: int = 6, scale: float = 0.01
) -> Likelihoods:
    generator = torch.Generator().manual_seed(seed)
    candidates = 4 if "list" in needs else 2

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    error_ref = 0.05 + draw(num, candidates)
    noise = torch.randn(num, candidates, generator=generator, dtype=torch.float64)
    error = (error_ref + scale * noise).clamp(min=0)
    utility = torch.stack([torch.randperm(candidates, generator=generator) for _ in range(num)]).double()
    old = torch.Generator().manual_seed(seed + 1)
    moved = 0.1 * scale * torch.randn(num, candidates, generator=old, dtype=torch.float64)  # since the last round
    return Likelihoods(
        logp=(-0.5 * error).requires_grad_(),
        logp_ref=-0.5 * error_ref,
        logp_old=-0.5 * error_ref + moved,
        utility=utility / (candidates - 1),
        mask=torch.ones(num, candidates, dtype=torch.bool),
        t=draw(num),
        kl=(draw(num, candidates) * scale).requires_grad_(),
        scores={"judge": draw(num, candidates)},
        baseline=Baseline(*torch.tensor([2e-6, 3e-6, -1e-6], dtype=torch.float64)),
    )


def drawn(name: str, seed: int, **changes: Any) -> Likelihoods:
    return random_likelihoods(seed, OBJECTIVES[name].needs, **changes)


def of_candidates(likelihoods: Likelihoods, change: Callable[[torch.Tensor], torch.Tensor]) -> Likelihoods:
    """The same change of rows or columns to everything that has candidates."""
    names_of = ("logp", "logp_ref", "logp_old", "utility", "mask", "kl")
    changed = {name: change(getattr(likelihoods, name)) for name in names_of if getattr(likelihoods, name) is not None}
    return replace(likelihoods, **changed, scores={k: change(v) for k, v in likelihoods.scores.items()})


def gradient(objective: Objective, likelihoods: Likelihoods) -> torch.Tensor:
    logp = likelihoods.logp.detach().clone().requires_grad_()
    objective(replace(likelihoods, logp=logp)).per_prompt.sum().backward()
    return torch.zeros_like(logp) if logp.grad is None else logp.grad


def at_reference(likelihoods: Likelihoods) -> Likelihoods:
    assert likelihoods.logp_ref is not None and likelihoods.kl is not None
    return replace(
        likelihoods,
        logp=likelihoods.logp_ref.clone().requires_grad_(),
        logp_old=likelihoods.logp_ref,
        kl=torch.zeros_like(likelihoods.kl),
        baseline=Baseline(*torch.zeros(3, dtype=torch.float64)),
    )


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_per_prompt_and_finite_at_extremes(name, dtype):
    for scale in (0.0, 1e-6, 1.0, 20.0):
        likelihoods = of_candidates(drawn(name, 1, scale=scale), lambda x: x if x.dtype == torch.bool else x.to(dtype))
        output = OBJECTIVES[name](likelihoods)
        assert output.per_prompt.shape == (6,)
        assert output.per_prompt.isfinite().all()
        assert gradient(OBJECTIVES[name], likelihoods).isfinite().all()
        assert not any(value.requires_grad for value in output.metrics.values())
        assert all(value.shape == (6,) for value in output.metrics.values())


@every
def test_what_it_does_not_need_it_does_not_touch(name):
    """A pair objective without `reference` in its needs runs without one, and so on."""
    objective = OBJECTIVES[name]
    likelihoods = drawn(name, 2)
    bare = likelihoods
    if "reference" not in objective.needs:
        bare = replace(bare, logp_ref=None, kl=None)
    if "scores" not in objective.needs:
        bare = replace(bare, scores={})
    if "baseline" not in objective.needs:
        bare = replace(bare, baseline=None)
    if "old" not in objective.needs:
        bare = replace(bare, logp_old=None)
    torch.testing.assert_close(objective(bare).per_prompt, objective(likelihoods).per_prompt, rtol=0, atol=0)


@every
def test_prompts_are_independent(name):
    """Order and slices do not matter, and no prompt's loss pulls at another: a batch statistic must be detached."""
    objective, likelihoods = OBJECTIVES[name], drawn(name, 3)
    whole = objective(likelihoods).per_prompt
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    torch.testing.assert_close(objective(of_candidates(likelihoods, lambda x: x[order])).per_prompt, whole[order])
    check_leak(objective, likelihoods)


def check_leak(objective: Objective, likelihoods: Likelihoods) -> None:
    logp = likelihoods.logp.detach().clone().requires_grad_()
    objective(replace(likelihoods, logp=logp)).per_prompt[2].backward()
    others = [0, 1, 3, 4, 5]
    assert logp.grad is None or (logp.grad[others] == 0).all()


@every
@given(seed=st.integers(0, 10_000))
@settings(max_examples=8, deadline=None)
def test_permuting_candidates_with_their_labels_changes_nothing(name, seed):  # L14
    likelihoods = drawn(name, seed)
    order = torch.randperm(likelihoods.logp.shape[1], generator=torch.Generator().manual_seed(seed))
    permuted = of_candidates(likelihoods, lambda x: x[:, order])
    torch.testing.assert_close(OBJECTIVES[name](permuted).per_prompt, OBJECTIVES[name](likelihoods).per_prompt)


@every
def test_masked_prompts_and_candidates_get_no_gradient(name):
    objective, likelihoods = OBJECTIVES[name], drawn(name, 4)
    mask = likelihoods.mask.clone()
    mask[2] = False
    output = objective(replace(likelihoods, mask=mask))
    assert output.per_prompt[2] == 0
    assert (gradient(objective, replace(likelihoods, mask=mask))[2] == 0).all()
    if "list" in objective.needs:  # a list of three padded to four is a list of three
        mask = likelihoods.mask.clone()
        mask[:, 3] = False
        padded = replace(likelihoods, mask=mask)
        three = of_candidates(likelihoods, lambda x: x[:, :3])
        torch.testing.assert_close(objective(padded).per_prompt, objective(three).per_prompt)
        assert (gradient(objective, padded)[:, 3] == 0).all()


def check_signs(objective: Objective, likelihoods: Likelihoods) -> None:  # L10
    """More likelihood for the best never raises the loss, more for the worst never lowers it."""
    grad = gradient(objective, likelihoods)
    best = grad.gather(1, likelihoods.utility.argmax(dim=1, keepdim=True))
    worst = grad.gather(1, likelihoods.utility.argmin(dim=1, keepdim=True))
    assert (best <= 0).all() and (best < 0).any()
    assert (worst >= 0).all()


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in SIDELESS])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=12, deadline=None)
def test_signs(name, seed):
    check_signs(OBJECTIVES[name], drawn(name, seed, scale=SCALE.get(name, 0.3)))


@every
def test_one_constant_on_all_rewards_changes_no_relative_loss(name):  # L12
    likelihoods = drawn(name, 7)
    shifted = replace(likelihoods, logp=likelihoods.logp.detach() - 0.25)
    before, after = OBJECTIVES[name](likelihoods).per_prompt, OBJECTIVES[name](shifted).per_prompt
    if name in POINTWISE | NONLINEAR:
        assert not torch.allclose(before, after)
    elif name == "pair split beta":
        assert (after > before).all()  # the winner's beta is the larger: lifting both away from it costs
    else:
        torch.testing.assert_close(before, after)


LN2 = math.log(2)
AT_REFERENCE = {  # L11
    "pair": LN2,
    "pair split beta": LN2,
    "pair hinge": 1.0,
    "pair square": 0.25 / 0.5**2,
    "pair smooth": LN2,
    "pair robust": LN2,
    "pair soft": LN2,
    "pair forward kl": LN2,
    "pair js": LN2,
    "pair alpha": LN2,
    "pair poly": LN2 + 0.5 * 4,
    "pair poly below": LN2 - 0.5,
    "pair scaled": LN2,
    "safeguarded_pair": LN2,
    "safeguarded_pair fully": LN2,
    "pair tdpo2": LN2,
    "all_pairs": LN2,
    "pair square of two draws": 0.25 / 0.5**2,
    "kto": 0.5,
    "kto class means": 0.5,
    "kto of the batch": 0.5,
    "nca": 2 * LN2,
    "bco": 2 * LN2,
    "bco of the batch": 2 * LN2,
    "sum of candidates": 2 * LN2,
    "sparse_po": LN2,
    "sparse_po of data": LN2,
    "sparse_po tdpo1": LN2,
    "poft": LN2,
    "kl": 0.0,
    "pair ratio clip": LN2,
    "pair ratio clip square": 0.25 / 0.5**2,
    "grpo": 0.0,  # a ratio of 1 everywhere, and advantages add to 0
    "grpo wide": 0.0,
    "grpo leave-one-out": 0.0,
    "grpo given": 0.0,
    "seppo": LN2,
    "seppo indicator": LN2,
    "seppo none": LN2,
    "explore": 0.5,
}


def check_zero(objective: Objective, name: str) -> None:
    likelihoods = at_reference(random_likelihoods(6, OBJECTIVES[name].needs))
    output = objective(likelihoods)
    expected = torch.full((6,), AT_REFERENCE[name], dtype=torch.float64)
    torch.testing.assert_close(output.per_prompt, expected, rtol=0, atol=1e-14)
    if "margin" in output.metrics:
        assert (output.metrics["margin"] == 0).all()


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_loss_at_the_reference(name):
    check_zero(OBJECTIVES[name], name)


def check_slope(objective: Objective) -> None:
    """Diffusion-DPO of beta 50 at the reference: gradient +-beta / 2 per prompt, and nothing for the reference."""
    likelihoods = at_reference(random_likelihoods(6))
    best = likelihoods.utility.argmax(dim=1, keepdim=True)
    grad = gradient(objective, likelihoods).gather(1, torch.cat([best, 1 - best], dim=1))
    torch.testing.assert_close(grad, torch.tensor([[-25.0, 25.0]], dtype=torch.float64).expand(6, 2))


def test_logistic_pair_slope_at_the_reference():
    check_slope(OBJECTIVES["pair"])


@every
def test_reference_gets_no_gradient_through_the_policy(name):  # L16
    likelihoods = drawn(name, 5)
    assert likelihoods.logp_ref is not None
    reference = likelihoods.logp_ref.clone().requires_grad_()
    OBJECTIVES[name](replace(likelihoods, logp_ref=reference.detach())).loss.backward()
    assert reference.grad is None


def same(left: dict[str, Any], right: dict[str, Any], needs: frozenset[str] = frozenset(), factor: float = 1) -> None:
    """Two specs are one objective, up to a factor."""
    for scale in (0.001, 0.1):
        likelihoods = random_likelihoods(8, needs, scale=scale)
        values = build("objective", left)(likelihoods).per_prompt
        torch.testing.assert_close(factor * values, build("objective", right)(likelihoods).per_prompt)


def test_slots_at_rest_are_diffusion_dpo():  # L2, L3, L5, L6
    dpo = {"name": "pair", "beta": 70}
    for slot in (
        {"labels": "smooth", "flip_rate": 0.0},
        {"labels": "robust", "flip_rate": 0.0},
        {"labels": "soft"},  # utilities 1 and 0 are probabilities
        {"divergence": "alpha", "alpha": 1e-9},
        {"beta_loser": 70},
        {"score_weights": {"judge": 0.0}},
        {"poly": 0.0},
        {"labels": "scaled", "sensitivity": 1.0},  # certain labels
    ):
        same(dpo | slot, dpo)
    same(dpo | {"divergence": "alpha", "alpha": 1.0}, dpo | {"divergence": "forward-kl"})


def test_two_in_a_list_are_a_pair():  # L1
    pair = {"name": "pair", "beta": 70}
    same({"name": "plackett_luce", "beta": 70}, pair)
    same({"name": "all_pairs", "beta": 70}, pair)
    gain = 1.0 * (1 / math.log(2) - 1 / math.log(3))
    same(pair, {"name": "lambda_rank", "beta": 70}, factor=gain)


def test_robust_labels_are_unbiased_under_flips():  # L5
    likelihoods, eps = random_likelihoods(9), 0.2
    robust = build("objective", {"name": "pair", "beta": 70, "labels": "robust", "flip_rate": eps})
    flipped = replace(likelihoods, utility=likelihoods.utility.flip(1))
    mean = (1 - eps) * robust(likelihoods).per_prompt + eps * robust(flipped).per_prompt
    torch.testing.assert_close(mean, build("objective", {"name": "pair", "beta": 70})(likelihoods).per_prompt)


def test_soft_labels_mirror():  # L5: soft(p) = soft(1 - p) with the candidates' roles swapped
    likelihoods = random_likelihoods(10)
    soft = build("objective", {"name": "pair", "beta": 70, "labels": "soft"})
    sided = replace(likelihoods, utility=torch.tensor([[0.8, 0.2]], dtype=torch.float64).expand(6, 2))
    mirrored = of_candidates(sided, lambda x: x.flip(1))
    torch.testing.assert_close(soft(sided).per_prompt, soft(mirrored).per_prompt)


def test_sums_add():
    likelihoods = random_likelihoods(11)
    terms = [{"name": "pair", "beta": 70}, {"name": "sft", "weight": 0.3}]
    parts = [build("objective", {k: v for k, v in term.items() if k != "weight"}) for term in terms]
    expected = gradient(parts[0], likelihoods) + 0.3 * gradient(parts[1], likelihoods)
    torch.testing.assert_close(gradient(build("objective", {"name": "sum", "terms": terms}), likelihoods), expected)


# Mutants: each law must catch the mistake it is there for, in any objective.
def _mutant(name: str, change: Callable[[Likelihoods], Likelihoods]) -> Objective:
    return lambda likelihoods: OBJECTIVES[name](change(likelihoods))


MISTAKES: dict[str, Callable[[Likelihoods], Likelihoods]] = {
    "sign flip": lambda x: replace(x, logp=2 * x.logp.detach() - x.logp),
    "swapped labels": lambda x: replace(x, utility=x.utility.amax(dim=1, keepdim=True) - x.utility),
    "detached best": lambda x: replace(
        x, logp=torch.where(x.utility == x.utility.amax(dim=1, keepdim=True), x.logp.detach(), x.logp)
    ),
}


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ONE_SIDED | SIDELESS])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_sign_are_caught_everywhere(name, mistake):
    with pytest.raises(AssertionError):
        check_signs(_mutant(name, MISTAKES[mistake]), drawn(name, 3, scale=SCALE.get(name, 1e-4)))


@pytest.mark.parametrize("name", sorted(ONE_SIDED))
def test_mistakes_of_one_sided_objectives_are_caught(name):
    for mistake in ("sign flip", "detached best"):
        with pytest.raises(AssertionError):
            check_signs(_mutant(name, MISTAKES[mistake]), drawn(name, 3, scale=SCALE.get(name, 1e-4)))


MUTANTS: dict[str, tuple[Callable[[Likelihoods], Likelihoods], Callable[[Objective], None]]] = {
    "wrong scale": (lambda x: replace(x, logp=2 * x.logp, logp_ref=2 * x.reference_logp), check_slope),
    "reference that follows the policy": (lambda x: replace(x, logp_ref=x.logp), check_slope),
    "reference left out": (lambda x: replace(x, logp_ref=0 * x.reference_logp), lambda m: check_zero(m, "pair")),
    "batch mean that carries a gradient": (
        lambda x: replace(x, logp=x.logp - x.logp.mean() * torch.tensor([1.0, 2.0], dtype=torch.float64)),
        lambda m: check_leak(m, random_likelihoods(3)),
    ),
}


@pytest.mark.parametrize("name", ["kto", "kto of the batch", "bco", "bco of the batch"])
def test_a_zero_point_that_carries_a_gradient_is_caught(name):
    def mutant(likelihoods: Likelihoods) -> LossOutput:
        mean = likelihoods.logratio.mean()
        return OBJECTIVES[name](replace(likelihoods, logp=likelihoods.logp - mean, baseline=Baseline(mean, mean, mean)))

    with pytest.raises(AssertionError):
        check_leak(mutant, random_likelihoods(3))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant):
    change, law = MUTANTS[mutant]
    with pytest.raises(AssertionError):
        law(_mutant("pair", change))
