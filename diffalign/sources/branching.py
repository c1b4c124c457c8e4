"""Candidates inside the sampler: at each step several next states of one x_t, judged by a preview (SPO, Step-DPO)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from diffalign.data import PromptCond, read_prompts
from diffalign.sources._judge import Judge
from diffalign.sources._pools import Pools
from diffalign.sources._rounds import Rounds
from diffalign.sources._sampled import RolloutSampling
from diffalign.sources._twin import StandIns, guided_rows
from diffalign.types import Setting, UserError


@dataclass(frozen=True)
class Branching:
    """Rounds of `prompts_per_round` prompts whose sampler branches, and `steps_per_round` optimizer steps on each.

    From step `first_step` on, `candidates` next states are drawn from one x_t. A scorer judges the preview of each (the
    clean image predicted from it, decoded); best and worst make a pair at that step, and sampling goes on from one.
    Step-aware preference optimisation: arXiv 2406.04314.

    prompts: a text or JSONL file, or sprites:<train|heldout>:<number>; drawn in epochs of an addressed order.
    scorers, weights: the judge of previews, the weighted sum of scores. A step-aware one is told the noise level
        (name: step_aware); others judge the preview as a picture.
    candidates: drawn at every step; 4 in the paper (SD1.5), 2 in its SDXL code.
    first_step: index of the first step that branches; 4 of 20, t = 751 (the paper's kappa = 750).
    last_step: index of the last step that branches; null: all that add noise. A log-density counts deviations in units
        of a step's own noise, so the late, nearly noiseless steps outweigh all others in the gradient while they hardly
        change the picture.
    window: steps that a candidate goes on alone before it is judged; all its steps get the verdict. 1 (SD1.5); 4 in the
        SDXL code (MSPO). Only a window's first step then shares its x_t.
    threshold: a pair is kept where the difference of its softmax probabilities, tanh((s_w - s_l)/(2 temperature)), is
        larger: 0.3 (SD1.5), 0.4 (SDXL) with CLIP scores that carry the logit scale.
    threshold_noisiest: with it the threshold follows the step's noise, from `threshold` at the least to this (LPO).
    temperature: of the softmax, in units of the score.
    go_on: from which candidate: `random` (the paper; 21.43 PickScore against 17.87 for `winner`), `winner`, `loser`, or
        `first`, an ordinary trajectory.
    keep: `every` pair, or `first-bad` (Step-DPO): one pair per prompt, the best candidate against the trajectory itself
        at its first step that another beats by `threshold`; wants go_on=first.
    bad_below: of first-bad: only a step whose preview scores below this is bad; in units of the score.
    preview: `full`; `half` decodes latents of half the size; or the folder of a tiny decoder (AutoencoderTiny).
    preview_steps: deterministic steps from a candidate to its preview, at most those that the sampler has left. 1 is
        the paper's, a blur at high noise that only a scorer trained on previews reads well; with more, any scorer of
        finished pictures judges what the candidate leads to, each for one more row of the network. All steps that are
        left give a child's value in tree search (MCTS-DPO, arXiv 2405.00451) of one leaf; its search is left out.
    sampling: eta defaults to 1 (DDIM) or 0.7 (the flow SDE), `noisy` must be all.
    latents: type in which latents are kept; they are rounded to it as they are drawn.
    scorer_timeout: seconds for one call of a scorer.
    """

    encoders: ClassVar[str] = "decoder"  # of the encoders, what every round needs on the device
    makes: ClassVar[str] = "steps"
    gives: ClassVar[frozenset[str]] = frozenset({"pair", "scores"})

    prompts: str | dict[str, Any] | None = None
    scorers: tuple[str | dict[str, Any], ...] = ()
    weights: tuple[float, ...] = ()
    candidates: int = 4
    first_step: int = 4
    last_step: int | None = None
    window: int = 1
    threshold: float = 0.3
    threshold_noisiest: float | None = None
    temperature: float = 1.0
    go_on: Literal["random", "winner", "loser", "first"] = "random"
    keep: Literal["every", "first-bad"] = "every"
    bad_below: float | None = None
    preview: str = "full"
    preview_steps: int = 1
    prompts_per_round: int = 40
    steps_per_round: int = 16
    sampling: RolloutSampling = field(default_factory=RolloutSampling)
    latents: Literal["float16", "float32"] = "float16"
    cache_dir: str = "cache"
    scorer_timeout: float | None = 600.0

    def __post_init__(self) -> None:
        least = {"candidates": 2, "first_step": 0, "window": 1, "preview_steps": 1}
        least |= {"prompts_per_round": 1, "steps_per_round": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise UserError(f"source.{name} must be at least {lowest} (got {getattr(self, name)})")
        if not self.temperature > 0:
            raise UserError(f"source.temperature must be positive (got {self.temperature})")
        if self.scorer_timeout is not None and not self.scorer_timeout > 0:
            raise UserError(f"source.scorer_timeout must be positive (got {self.scorer_timeout})")
        for name in ("threshold", "threshold_noisiest"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UserError(f"source.{name} must lie in [0, 1): it is a gap of probabilities (got {value})")
        if self.last_step is not None and not self.first_step <= self.last_step < self.sampling.num_steps:
            raise UserError(f"source.last_step must lie in first_step..num_steps-1 (got {self.last_step})")
        if self.first_step + self.window > self.sampling.num_steps:
            raise UserError(
                f"source.first_step={self.first_step} and source.window={self.window} leave no step of"
                f" {self.sampling.num_steps} (source.sampling.num_steps)"
            )
        if self.sampling.eta == 0 or self.sampling.noisy != (0.0, 1.0):
            raise UserError("source.sampling: candidates differ by the steps' noise: leave eta above 0 and noisy alone")
        if self.bad_below is not None and self.keep != "first-bad":
            raise UserError("source.bad_below is the score below which a step is bad: set source.keep=first-bad")
        if self.keep == "first-bad" and (self.go_on != "first" or self.window != 1):
            raise UserError("source.keep=first-bad follows one trajectory: set source.go_on=first and source.window=1")

    @cached_property
    def judge(self) -> Judge:
        """The scorers, built."""
        return Judge(self.scorers, self.weights, "sum", self.scorer_timeout)

    @cached_property
    def prompt_list(self) -> list[str]:
        """The prompts."""
        return read_prompts(self.prompts, "source.prompts")

    def check(self) -> None:
        """Reads the prompts and builds the scorers, so that what is wrong is reported before any weight is loaded."""
        _ = self.prompt_list, self.judge

    def twin(self, stand_ins: StandIns) -> Branching:
        """The same on the smallest scale, for a dry run: its own prompts where it names any."""
        return replace(
            self,
            **stand_ins.of_rounds(self.sampling),
            prompts=self.prompts or stand_ins.prompts,
            prompts_per_round=2,
            candidates=2,
            first_step=1,
            last_step=None,
            window=min(self.window, 2),
            threshold=0.0,
            threshold_noisiest=None,
            bad_below=None,
            preview_steps=min(self.preview_steps, 2),
        )

    def training_rows(self, draws: int) -> int:
        """Rows of the network per pair: candidates of one step share their x_t."""
        return guided_rows(self.sampling) * (1 if self.window == 1 else 2)

    def sampling_rows(self, batch_size: int) -> float:
        """Rows of the network that sampling takes per optimizer step, on the mean."""
        end = self.sampling.num_steps - 1  # its preview is the picture itself
        judged = end if self.last_step is None else min(self.last_step + 1, end)
        per_prompt = self.first_step + 1 + self.candidates * (judged - self.first_step)
        for start in range(self.first_step, judged, self.window):
            left = self.sampling.num_steps - min(start + self.window, judged)
            per_prompt += self.candidates * (min(self.preview_steps, left) - 1)
        return guided_rows(self.sampling) * per_prompt * self.prompts_per_round / self.steps_per_round

    def prepare(self, policy: Any, reference: Any, setting: Setting) -> Rounds:
        """Encodes the prompts; the pairs come with the first round.

        Raises:
            UserError: a model with a user branch, no noisy step from `first_step` on, or no tiny decoder at `preview`.
        """
        if getattr(policy, "users", None) is not None:
            raise UserError("source.name=branching has no users: leave model.users empty")
        cond = PromptCond(self.prompt_list, policy, self.cache_dir, rank=setting.rank, world_size=setting.size)
        return Rounds(Pools(self, policy, cond, setting), self.steps_per_round, setting)
