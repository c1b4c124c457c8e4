"""Which charts a run is read by, in which groups, and what good looks like in each."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from diffalign.runs._curves import Curves

MAX_OTHERS = 24  # charts of metrics that no chart below names


@dataclass(frozen=True)
class Plan:
    """What one chart shows: for each line its label and the metric names it goes by; the first logged one is drawn."""

    title: str
    note: str  # what good looks like
    lines: tuple[tuple[str, tuple[str, ...]], ...]
    level: float | None = None
    level_label: str = ""
    is_loss: bool = False  # may be drawn on a logarithmic axis


ACCURACY, SCORERS = "Does it learn the preference?", "Scorers on the sample grids"
PROXY = Plan(
    "Proxy against held-out scorers",
    "Change since the first grid in standard errors. Good: held-out scorers rise with the proxy; a vertical line is the"
    " over-optimisation alarm.",
    (),
    0.0,
)
MAIN: tuple[tuple[str, tuple[Plan, ...]], ...] = (
    (
        ACCURACY,
        (
            Plan(
                "Loss",
                "Good: falls slowly from ln 2 and does not collapse to 0.",
                (("loss", ("loss",)),),
                math.log(2),
                "ln 2",
                True,
            ),
            Plan(
                "Margin",
                "Good: rises from 0, on held-out pairs too.",
                (("training", ("margin",)), ("held out", ("holdout/margin",))),
                0.0,
            ),
            Plan(
                "Implicit accuracy",
                "Good: above chance on held-out pairs; training far above held out is overfitting.",
                (
                    ("training", ("implicit_accuracy", "accuracy")),
                    ("held out", ("holdout/implicit_accuracy", "holdout/accuracy")),
                ),
                0.5,
                "chance",
            ),
        ),
    ),
    (
        "What happens to winner and loser?",
        (
            Plan(
                "Error against the reference",
                "Good: the winner's stays below 0 or near it; both rising means the winner is displaced too.",
                (("winner", ("winner_error_gap",)), ("loser", ("loser_error_gap",))),
                0.0,
            ),
            Plan(
                "Denoising error",
                "Good: the winner's does not rise; a loser's that runs away is degradation.",
                (("winner", ("winner_error",)), ("loser", ("loser_error",))),
            ),
            Plan(
                "Held-out ranking",
                "Good: above the reference's: the model itself ranks winners first.",
                (("policy", ("holdout/ranking_accuracy",)), ("reference", ("holdout/reference_ranking_accuracy",))),
                0.5,
                "chance",
            ),
            Plan(
                "Displaced winners",
                "Share of held-out winners that became less likely. Good: low.",
                (("share", ("holdout/share_displaced",)),),
            ),
        ),
    ),
)
MINOR = (
    Plan("Gradient norm", "Good: no growth and no spikes far above the rest.", (("norm", ("grad_norm",)),)),
    Plan("Learning rate", "As configured.", (("rate", ("lr",)),)),
    Plan("Pairs per second", "Dips are validations, grids and rounds.", (("pairs", ("pairs_per_second",)),)),
    Plan("Ties", "Share of pairs without a winner.", (("share", ("tie_rate",)),)),
)
HIDDEN = re.compile(r"_(se|low|high)$|/num_prompts$|/t[\d.]+-[\d.]+$")  # ends of intervals, counts, noise levels


def plans_of(runs: Sequence[Curves]) -> list[tuple[str, tuple[Plan, ...], bool]]:
    """(title, charts, whether minor) of every group, those of metrics that only these runs have included."""
    names = dict.fromkeys(name for curves in runs for name in list(curves.series))
    samples = [name for name in names if name.startswith("samples/") and not HIDDEN.search(name)]
    rounds = [name for name in names if name.startswith("rollout/")]
    planned = {
        name for plan in (*MINOR, *(p for _, plans in MAIN for p in plans)) for _, of in plan.lines for name in of
    }
    rest = [name for name in names if name not in planned and name not in (*samples, *rounds)]
    others = [name for name in rest if not HIDDEN.search(name)]

    def plain(name: str) -> Plan:
        return Plan(name, "", ((name.rpartition("/")[2], (name,)),))

    scorers = tuple(
        Plan("Diversity", "Effective number of pictures. Good: does not fall.", (("diversity", (name,)),))
        if name == "samples/diversity"
        else Plan(name.removeprefix("samples/"), "Mean over the sample grid. Good: rises.", (("mean", (name,)),))
        for name in samples
    )
    return [
        *((title, plans, False) for title, plans in MAIN),
        (SCORERS, scorers, False),
        ("Rounds of own pictures", tuple(map(plain, rounds[:MAX_OTHERS])), True),
        ("Mechanics", (*MINOR, *map(plain, others[:MAX_OTHERS])), True),
    ]
