"""Lists: Plackett-Luce and PRO, LambdaLoss (RankDPO, LiPO), all pairs; the sheets' vectors and the laws of lists."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from likelihood_makers import agree, check_sound, columns, from_errors, from_rewards, gradient, permuted

from diffalign.registry import build
from diffalign.types import Likelihoods, UserError

S, PHI = [0.9, 0.2, -0.4, 0.5], [1.0, 2 / 3, 1 / 3, 0.0]
LISTWISE = [
    {"name": "plackett_luce"},
    {"name": "plackett_luce", "temperature": "gap"},
    {"name": "lambda_rank"},
    {"name": "lambda_rank", "rank_by": "model"},
    {"name": "all_pairs"},
    {"name": "all_pairs", "link": "hinge"},
]
every = pytest.mark.parametrize("spec", LISTWISE, ids=lambda spec: "-".join(spec.values()))


def objective(spec, beta=2.0):
    return build("objective", {**spec, "beta": beta})


def random_lists(seed: int, num: int = 5, size: int = 4, ties: bool = False, scale: float = 1.0) -> Likelihoods:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        utility = torch.randint(0, 3, (num, size), generator=generator).double() / 2
    else:
        utility = torch.stack([torch.randperm(size, generator=generator) for _ in range(num)]).double() / (size - 1)
    rewards = scale * torch.randn(num, size, generator=generator, dtype=torch.float64)
    return from_rewards(rewards.tolist(), utility.tolist(), beta=2.0)


@pytest.mark.parametrize(
    "spec,loss",
    [
        ({"name": "plackett_luce"}, 3.197173),
        ({"name": "plackett_luce", "temperature": "gap"}, 2.830982),
        ({"name": "lambda_rank", "rank_by": "model"}, 0.741984),
        ({"name": "lambda_rank"}, 0.842923),
        ({"name": "all_pairs"}, 0.615034),
    ],
)
def test_vectors(spec, loss):  # C-pl, C-pro, C-lambda, C-allpairs
    agree(objective(spec)(from_rewards([S], [PHI], beta=2)).per_prompt, [loss])
    single = from_rewards([S], [PHI], beta=2, dtype=torch.float32)
    agree(objective(spec)(single).per_prompt, [loss], atol=0, rtol=1e-5)


def test_degradation_ladder():  # C-ladder
    agree(objective({"name": "plackett_luce"})(from_rewards([[0.8, 0.5, 0.1]], [[3, 2, 1]], 2)).per_prompt, [1.318331])


@pytest.mark.parametrize(
    "rank_by,weights",
    [
        ("model", [0.297627, 0.607871, 0.532456, 0.032752, 0.110955, 0.075092]),
        ("label", [0.219691, 0.533854, 0.821360, 0.061858, 0.169703, 0.025995]),
    ],
)
def test_lambda_weights_are_constants_of_the_gradient(rank_by, weights):  # C-lambda's weights
    rewards = torch.tensor(S, dtype=torch.float64)
    expected = torch.zeros(4, dtype=torch.float64)
    for (i, j), weight in zip([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], weights, strict=True):
        pull = weight * torch.sigmoid(rewards[j] - rewards[i])
        expected[i] -= pull
        expected[j] += pull
    likelihoods = from_rewards([S], [PHI], beta=2)
    actual = gradient(objective({"name": "lambda_rank", "rank_by": rank_by}), likelihoods)  # reward = -error here
    torch.testing.assert_close(-actual[0], expected, atol=2e-6, rtol=0)


RANKDPO = ([[-0.0010, 0.0004, -0.0006, 0.0002]], [[14 / 15, 9 / 15, 5 / 15, 2 / 15]])


@pytest.mark.parametrize("beta,loss", [(1000, 0.628567165657), (5000, 0.462474952474)])
def test_rankdpo(beta, loss):
    likelihoods = from_errors(RANKDPO[0], [[0.0] * 4], RANKDPO[1])
    agree(objective({"name": "lambda_rank"}, 2 * beta)(likelihoods).per_prompt, [loss], atol=1e-11)


def test_rankdpo_gradient_and_start():
    rank = objective({"name": "lambda_rank"}, 2000.0)
    likelihoods = from_errors(RANKDPO[0], [[0.0] * 4], RANKDPO[1])
    agree(gradient(rank, likelihoods), [[384.136950857, 60.3678598113, -218.362830883, -226.141979786]], atol=1e-7)
    at_reference = from_errors([[0.0] * 4], [[0.0] * 4], RANKDPO[1])
    agree(rank(at_reference).per_prompt, [1.06174369232], atol=1e-10)


def test_ranking_by_the_model_starts_from_the_labels():
    """All rewards tie at the reference: weights of 0 would leave the model there for ever."""
    at_reference = from_errors([[0.0] * 4], [[0.0] * 4], [PHI])
    by_model = objective({"name": "lambda_rank", "rank_by": "model"})
    by_label = objective({"name": "lambda_rank"})
    torch.testing.assert_close(gradient(by_model, at_reference), gradient(by_label, at_reference))
    assert gradient(by_model, at_reference).abs().sum() > 0


def test_pairs_are_diffusion_dpo():  # L1
    errors, reference = [[0.10, 0.12], [0.20, 0.25], [0.08, 0.30]], [[0.13, 0.11], [0.24, 0.22], [0.15, 0.25]]
    pair = from_errors(errors, reference, [[1, 0], [0, 1], [1, 0]])
    expected = objective({"name": "pair"}, 20)(pair)
    agree(expected.per_prompt, [0.513015, 1.103186, 0.263282])  # C-ddpo
    for spec in ({"name": "plackett_luce"}, {"name": "plackett_luce", "temperature": "gap"}, {"name": "all_pairs"}):
        output = objective(spec, 20)(pair)
        torch.testing.assert_close(output.per_prompt, expected.per_prompt)
        for name, value in expected.metrics.items():
            torch.testing.assert_close(output.metrics[name], value)
    for rank_by in ("label", "model"):
        output = objective({"name": "lambda_rank", "rank_by": rank_by}, 20)(pair)
        weight = 1 / math.log(2) - 1 / math.log(3)
        torch.testing.assert_close(output.per_prompt, weight * expected.per_prompt)
    two = objective({"name": "lambda_rank"})(from_rewards([[0.3, 0.1]], [[1, 0]], 2))
    agree(two.per_prompt, [0.318483])  # C-lambda-2
    hinge = objective({"name": "all_pairs", "link": "hinge"})
    agree(hinge(from_rewards(columns([0.3, -0.2, 1.1], [0.1, 0.4, -0.5]), [[1, 0]] * 3, 2)).per_prompt, [0.8, 1.6, 0.0])


@every
@pytest.mark.parametrize("ties", [False, True])
def test_the_order_of_a_list_does_not_matter(spec, ties):
    likelihoods = random_lists(1, ties=ties)
    expected = objective(spec)(likelihoods).per_prompt
    for order in permutations(range(4)):
        torch.testing.assert_close(objective(spec)(permuted(likelihoods, order)).per_prompt, expected)


@every
def test_signs_and_shift(spec):
    """The best rises and the worst falls; only differences of rewards matter (not to PRO)."""
    likelihoods = random_lists(2)
    slope = gradient(objective(spec), likelihoods)
    best, worst = likelihoods.utility.argmax(dim=1), likelihoods.utility.argmin(dim=1)
    assert (slope.gather(1, best[:, None]) >= 0).all() and (slope.gather(1, worst[:, None]) <= 0).all()
    assert slope.abs().sum() > 0
    if spec.get("temperature") != "gap":
        torch.testing.assert_close(slope.sum(dim=1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
        shifted = Likelihoods(likelihoods.logp, likelihoods.logp_ref + 0.7, likelihoods.utility, likelihoods.mask)
        torch.testing.assert_close(objective(spec)(shifted).per_prompt, objective(spec)(likelihoods).per_prompt)


def test_pro_is_plackett_luce_at_equal_gaps_and_not_shift_invariant():
    gap = objective({"name": "plackett_luce", "temperature": "gap"})
    two = from_rewards([[0.3, 0.1]], [[0.5, 0.0]], 2)
    agree(gap(two).per_prompt, [math.log1p(math.exp(-0.5 * 0.2))], atol=1e-12)  # a gap of 1/2 halves the margin
    likelihoods = random_lists(3)
    shifted = Likelihoods(likelihoods.logp, likelihoods.logp_ref + 0.7, likelihoods.utility, likelihoods.mask)
    assert not torch.allclose(gap(shifted).per_prompt, gap(likelihoods).per_prompt)


@every
def test_ties_are_not_ordered(spec):
    """Two tied below a best one: no pull between them; a wholly tied list has nothing to say."""
    tied = from_rewards([[0.3, 0.2, -0.5], [0.3, 0.2, -0.5]], [[1, 0, 0], [0.5, 0.5, 0.5]], beta=2)
    output = check_sound(objective(spec), tied)
    assert output.per_prompt[0] > 0 and output.per_prompt[1] == 0
    assert output.metrics["implicit_accuracy"][0] == 1 and output.metrics["implicit_accuracy"][1].isnan()
    assert output.metrics["margin"][0].item() == pytest.approx((0.1 + 0.8) / 2)
    slope = gradient(objective(spec), tied)
    assert (slope[0, 1:] <= 0).all() and (slope[1] == 0).all()
    equal = from_rewards([[0.3, -0.5, -0.5]], [[1, 0, 0]], beta=2)
    assert gradient(objective(spec), equal)[0, 1] == gradient(objective(spec), equal)[0, 2]


def test_tie_values():
    tied = from_rewards([[0.3, 0.2, -0.5], [0.3, 0.2, -0.5]], [[1, 0, 0], [1, 1, 0]], beta=2)
    r = [0.3, 0.2, -0.5]

    def drop(chosen, *others):
        return math.log(sum(math.exp(r[i]) for i in (chosen, *others))) - r[chosen]

    agree(objective({"name": "plackett_luce"})(tied).per_prompt, [drop(0, 1, 2), drop(0, 2) + drop(1, 2)], atol=1e-12)
    agree(
        objective({"name": "all_pairs"})(tied).per_prompt,
        [(drop(0, 1) + drop(0, 2)) / 2, (drop(0, 2) + drop(1, 2)) / 2],
        atol=1e-12,
    )
    step = 1 / math.log(2) - 1 / math.log(3.5)  # ranks 1, 2.5, 2.5
    last = 1 / math.log(2.5) - 1 / math.log(4)  # ranks 1.5, 1.5, 3
    agree(
        objective({"name": "lambda_rank"})(tied).per_prompt,
        [step * (drop(0, 1) + drop(0, 2)), last * (drop(0, 2) + drop(1, 2))],
        atol=1e-12,
    )


@every
def test_masked_candidates_are_left_out(spec):
    """Whatever stands there: a list with a missing candidate is the shorter list; an empty one has loss 0."""
    full = from_rewards([[0.9, 0.2, -0.4]] * 2, [[1, 0.5, 0]] * 2, beta=2)
    nan = float("nan")
    padded = from_rewards(
        [[0.9, nan, 0.2, -0.4], [nan, 0.0, 1.0, 2.0]],
        [[1, 9, 0.5, 0], [3, 2, 1, 0]],
        beta=2,
        mask=[[True, False, True, True], [False] * 4],
    )
    output = check_sound(objective(spec), padded)
    torch.testing.assert_close(output.per_prompt[0], objective(spec)(full).per_prompt[0])
    assert output.per_prompt[1] == 0 and output.metrics["margin"][1].isnan()
    slope = gradient(objective(spec), padded)
    torch.testing.assert_close(slope[0, [0, 2, 3]], gradient(objective(spec), full)[0])
    assert slope[0, 1] == 0 and (slope[1] == 0).all()


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_finite_at_extremes(spec, dtype):
    for scale in (0.0, 1e-8, 1.0, 1e4):
        wide = random_lists(4, scale=scale)
        wide = Likelihoods(
            wide.logp.detach().to(dtype).requires_grad_(), wide.logp_ref.to(dtype), wide.utility.to(dtype), wide.mask
        )
        check_sound(objective(spec), wide)
    errors = from_errors([[0.0, 20.0, 0.0, 20.0]], [[20.0, 0.0, 0.0, 20.0]], [[3, 2, 1, 0]], dtype=dtype)
    check_sound(build("objective", spec), errors)


@every
def test_refusals(spec):
    with pytest.raises(UserError, match="objective.beta"):
        objective(spec, 0.0)
    one = torch.zeros(2, 1)
    with pytest.raises(UserError, match="1 candidate per prompt"):
        objective(spec)(Likelihoods(one, one, one, one.bool()))
    two = torch.zeros(2, 2)
    with pytest.raises(UserError, match="reference.name"):
        objective(spec)(Likelihoods(two, None, two, two.bool()))
    assert objective(spec).needs == {"reference", "list"}
