"""The policy's own pictures, sampled in rounds, judged by scorers: finished images, or every step that made them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from diffalign.data import PromptCond, read_prompts
from diffalign.sources._judge import Judge, Pairs, Prefer
from diffalign.sources._rollouts import Rollouts
from diffalign.sources._rounds import Rounds
from diffalign.sources._sampled import RolloutSampling
from diffalign.sources._twin import StandIns, guided_rows
from diffalign.types import Setting, UserError


@dataclass(frozen=True)
class Rollout:
    """Rounds of `prompts_per_round` x `images_per_prompt` images, and `steps_per_round` optimizer steps on each.

    prompts: a text or JSONL file, or sprites:<train|heldout>:<number>; drawn in epochs of an addressed order.
    scorers: the judge: names, or mappings with `name` and a scorer's keys. Watch others with `stop.scorers`.
    votes: people judge instead: after sampling the run ends and says where to vote (a ballot of pictures, a file of
        votes); the same command goes on when the votes are there.
    weights, prefer: of several scorers: the weighted `sum`, `pareto` dominance (D3PO's code), or `maximin` (the worst
        standardised score). `pairwise`: the one scorer is a general_preference, which compares pictures two at a time;
        the utility of one is its mean probability to beat the others of the prompt.
    compare: `pairs` makes records of two, `groups` of all images of a prompt, for listwise objectives and GRPO.
    pairs: which two: the `best-worst` of a prompt, or `all` whose scores differ by more than `min_margin`.
    utility: of a pair `won` is (1, 0); `score` is the sum of scores; `win-rate` the mean probability to beat the other
        images of the prompt, sigmoid(gap / temperature), or the hard share without a temperature (SPPO).
    reject: temperature of statistical rejection sampling (RSO): an image is kept with probability
        exp((score - best of the prompt) / reject). Null keeps all.
    record: `images`, to be noised again by likelihood.name=elbo; `steps`, each a record of its own (D3PO, GRPO); or
        `trajectories`, whose steps are added up (M-DPO, TreePO), for likelihood.name=step.
    branch_at: sibling images share the first noise and this many steps; null: nothing. D3PO's code: 0.
    steps_used: of the recorded ones, drawn at random per prompt; null: all. A trajectory's sum stays unbiased.
    step_weight: in a trajectory: `sum` adds steps up; `cosine` is TreePO's mean with weight 1 + cos between a
        candidate's x_prev and the best one's.
    sample_from: whose images: the `policy`'s, the `reference`'s (RSO), or `both`: the last of a prompt is the
        reference's (XPO).
    record_reference: of recorded steps, keep the reference's predictions too, in float32: its rows are then taken once,
        while sampling, and training never runs it. Worth it where units are visited more than once; the reference must
        be fixed within a round.
    record_means: of recorded steps, keep the means that they were drawn around too, in float32, for
        likelihood.ratio=normalized.
    latents: type in which latents are kept; they are rounded to it as they are drawn, so nothing is lost later.
    keep_images: pictures and preference records of every round stay in the run folder as a data set.
    scorer_timeout: seconds for one call of a scorer.
    """

    encoders: ClassVar[str] = "decoder"  # of the encoders, what every round needs on the device

    prompts: str | dict[str, Any] | None = None
    scorers: tuple[str | dict[str, Any], ...] = ()
    votes: bool = False
    weights: tuple[float, ...] = ()
    prefer: Prefer = "sum"
    images_per_prompt: int = 2
    prompts_per_round: int = 64
    steps_per_round: int = 16
    compare: Literal["pairs", "groups"] = "pairs"
    pairs: Pairs = "best-worst"
    min_margin: float = 0.0
    utility: Literal["won", "score", "win-rate"] = "won"
    temperature: float | None = None
    reject: float | None = None
    record: Literal["images", "steps", "trajectories"] = "images"
    branch_at: int | None = None
    steps_used: int | None = None
    step_weight: Literal["sum", "cosine"] = "sum"
    sample_from: Literal["policy", "reference", "both"] = "policy"
    sampling: RolloutSampling = field(default_factory=RolloutSampling)
    record_reference: bool = False
    record_means: bool = False
    latents: Literal["float16", "float32"] = "float16"
    keep_images: bool = True
    cache_dir: str = "cache"
    scorer_timeout: float | None = 600.0

    def __post_init__(self) -> None:
        for name, least in (("images_per_prompt", 2), ("prompts_per_round", 1), ("steps_per_round", 1)):
            if getattr(self, name) < least:
                raise UserError(f"source.{name} must be at least {least} (got {getattr(self, name)})")
        for name in ("temperature", "reject", "scorer_timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"source.{name} must be positive (got {value})")
        if self.record == "images":
            for name in ("steps_used", "step_weight", "record_reference", "record_means"):
                if getattr(self, name) != getattr(Rollout, name):
                    raise UserError(f"source.{name} is of recorded steps: set source.record=steps or trajectories")
        elif self.sampling.eta == 0:
            raise UserError("source.sampling.eta=0 draws nothing: recorded steps need an eta above 0, or null")
        if self.min_margin < 0:
            raise UserError(f"source.min_margin must be at least 0 (got {self.min_margin})")
        if self.votes and (self.scorers or not self.keep_images):
            raise UserError("source.votes=true: people judge the kept pictures: leave scorers empty, keep_images=true")
        if self.steps_used is not None and self.steps_used < 1:
            raise UserError(f"source.steps_used must be at least 1 (got {self.steps_used})")
        if self.branch_at is not None and not 0 <= self.branch_at < self.sampling.num_steps:
            raise UserError(f"source.branch_at must lie in 0..num_steps-1 (got {self.branch_at})")
        if self.branch_at is not None and self.record == "images" and not self.sampling.eta:
            raise UserError("source.branch_at makes all images of a prompt the same without noise: set sampling.eta")

    @property
    def makes(self) -> str:
        """What likelihoods may take."""
        return "images" if self.record == "images" else "steps"

    @property
    def gives(self) -> frozenset[str]:
        """What objectives may ask of it."""
        is_pair = self.compare == "pairs" or self.images_per_prompt == 2
        return frozenset(
            {"scores"}
            | ({"pair"} if is_pair else set())
            | ({"list"} if self.compare == "groups" else set())
            | ({"means"} if self.record_means else set())
        )

    @cached_property
    def judge(self) -> Judge:
        """The scorers, built."""
        if self.votes:
            return Judge.of_people()
        return Judge(self.scorers, self.weights, self.prefer, self.scorer_timeout)

    @cached_property
    def prompt_list(self) -> list[str]:
        """The prompts."""
        return read_prompts(self.prompts, "source.prompts")

    def check(self) -> None:
        """Reads the prompts and builds the scorers, so that what is wrong is reported before any weight is loaded."""
        _ = self.prompt_list, self.judge

    def twin(self, stand_ins: StandIns) -> Rollout:
        """The same on the smallest scale, for a dry run: its own prompts where it names any."""
        return replace(
            self,
            **stand_ins.of_rounds(self.sampling),
            prompts=self.prompts or stand_ins.prompts,
            votes=False,
            prefer="sum",  # the stand-in gives scores
            prompts_per_round=2,
            images_per_prompt=2,
            min_margin=0.0,
            reject=None,
            branch_at=None if self.branch_at is None else min(self.branch_at, 1),
            steps_used=None if self.steps_used is None else min(self.steps_used, 2),
        )

    def training_rows(self, draws: int) -> int:
        """Rows of the network per unit of a batch; `draws` of noise where finished images are noised again."""
        images = self.images_per_prompt if self.compare == "groups" else 2
        if self.record == "images":
            return images * draws
        steps = 1 if self.record == "steps" else self.steps_used or self.sampling.num_steps
        return guided_rows(self.sampling) * steps * images

    def sampling_rows(self, batch_size: int) -> float:
        """Rows of the network that sampling takes per optimizer step, on the mean."""
        per_prompt = guided_rows(self.sampling) * self.sampling.num_steps * self.images_per_prompt
        return per_prompt * self.prompts_per_round / self.steps_per_round

    def prepare(self, policy: Any, reference: Any, setting: Setting) -> Rounds:
        """Encodes the prompts; the pictures come with the first round.

        Raises:
            UserError: a model with a user branch, or a reference that cannot be sampled from.
        """
        if getattr(policy, "users", None) is not None:
            raise UserError("source.name=rollout has no users: leave model.users empty")
        if (self.sample_from != "policy" or self.record_reference) and not getattr(reference, "gives", frozenset()):
            key = "record_reference" if self.record_reference else f"sample_from={self.sample_from}"
            raise UserError(f"source.{key} needs a reference: set reference.name=adapter_off or checkpoint_pool")
        cond = PromptCond(self.prompt_list, policy, self.cache_dir, rank=setting.rank, world_size=setting.size)
        return Rounds(Rollouts(self, policy, reference, cond, setting), self.steps_per_round, setting)
