"""Recorded images against a rival that a model makes for the same prompt: SePPO, Reward-PO, HyPO."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from diffalign.sources._batches import RecordedBatches
from diffalign.sources._judge import Judge, Prefer
from diffalign.sources._rivals import RivalBatches
from diffalign.sources._sampled import RolloutSampling
from diffalign.sources._twin import StandIns, guided_rows
from diffalign.sources.offline import Offline
from diffalign.types import Record, Setting, UserError


@dataclass(frozen=True)
class Rivals(Offline):
    """Records as source.name=offline reads them, with a sampled image as the last candidate of each.

    Rivals are made in rounds: at the first of every `steps_per_round` steps, for all records of these steps, with the
    weights of that moment; they stay on disk until the round after.

    rival_from: whose image: the reference's (SePPO: a past checkpoint, reference.name=checkpoint_pool with `every`
        equal to `steps_per_round`) or the policy's (Reward-PO, HyPO).
    recorded: which of a record's images compete with it: its `winner` (SePPO learns from winners alone), or `all`.
    scorers, weights, prefer: judge recorded image and rival alike; utility is then what they say. Without scorers the
        rival gets `rival_utility` and the recorded images keep theirs; a `winner` alone is worth 1 more than it.
    rival_utility: below the winner's: the rival is the loser.
    """

    rival_from: Literal["reference", "policy"] = "reference"
    recorded: Literal["winner", "all"] = "winner"
    steps_per_round: int = 30
    scorers: tuple[str | dict[str, Any], ...] = ()
    weights: tuple[float, ...] = ()
    prefer: Prefer = "sum"
    rival_utility: float = 0.0
    sampling: RolloutSampling = field(default_factory=RolloutSampling)
    latents: Literal["float16", "float32"] = "float16"
    scorer_timeout: float | None = 600.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps_per_round < 1:
            raise UserError(f"source.steps_per_round must be at least 1 (got {self.steps_per_round})")
        if self.users is not None or self.part is not None or self.masks is not None or self.buckets != "square":
            raise UserError(
                "source.name=rivals samples at one size, for no users: leave users, part, masks and buckets alone"
            )
        if self.scorer_timeout is not None and not self.scorer_timeout > 0:
            raise UserError(f"source.scorer_timeout must be positive (got {self.scorer_timeout})")
        if self.scorers and self.prompt_dropout:
            raise UserError("source.scorers would judge rivals of dropped prompts by them: set source.prompt_dropout=0")
        if self.sampling.noisy != (0.0, 1.0):
            raise UserError("source.sampling.noisy is of recorded steps, and rivals are finished images: leave it out")

    @property
    def encoders(self) -> Literal["done", "decoder", "needed"]:
        """Whether text encoders and VAE can leave the device when the data is ready: a judge needs the decoder."""
        return "needed" if not self.cache else "decoder" if self.scorers else "done"

    @property
    def gives(self) -> frozenset[str]:
        """What objectives may ask of it."""
        return frozenset({"pair", "list"})

    @cached_property
    def judge(self) -> Judge | None:
        """The scorers, built; None without any."""
        return Judge(self.scorers, self.weights, self.prefer, self.scorer_timeout) if self.scorers else None

    def utility_of(self, record: Record) -> tuple[float, ...]:
        """The utilities of a record's candidates and of its rival, as far as they are known before anybody judges."""
        if self.recorded == "winner":
            return (self.rival_utility + 1, self.rival_utility)
        return (*record.utility, self.rival_utility)

    def check(self) -> None:
        """Opens the data and builds the scorers, so that what is wrong is reported before any weight is loaded."""
        super().check()
        _ = self.judge

    def twin(self, stand_ins: StandIns) -> Rivals:
        """See `Offline.twin`."""
        smaller = stand_ins.of_rounds(self.sampling) | {"prefer": "sum"}  # the stand-in gives scores
        if not self.scorers:
            smaller["scorers"] = ()
        return replace(super().twin(stand_ins), **smaller)  # type: ignore[return-value]

    def sampling_rows(self, batch_size: int) -> float:
        """Rows of the network that sampling takes per optimizer step: a rival for each record."""
        return guided_rows(self.sampling) * self.sampling.num_steps * batch_size

    def prepare(self, policy: Any, reference: Any, setting: Setting) -> RivalBatches:  # type: ignore[override]
        """Builds or opens the cache; the rivals come with the first round.

        Raises:
            UserError: unusable data, or no reference to sample from.
        """
        if self.rival_from == "reference" and not getattr(reference, "gives", frozenset()):
            raise UserError("source.rival_from=reference needs one: set reference.name=checkpoint_pool")
        mine = super().prepare(policy, reference, setting)
        assert isinstance(mine, RecordedBatches)
        whole = RecordedBatches(self, mine.data, policy, replace(setting, rank=0, size=1))
        return RivalBatches(self, mine, whole, policy, reference, setting)
