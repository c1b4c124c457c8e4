"""The types every layer shares: batches, likelihoods, records and the protocols of the seams.

Shape letters everywhere: B prompts, K candidates per prompt, C H W latent axes, N = B*K folded, L tokens, D features.
`t` lies in [0, 1] in every model family: 0 is data, 1 is noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffalign._batches import EndpointBatch as EndpointBatch
from diffalign._batches import StepBatch as StepBatch
from diffalign._batches import fold as fold
from diffalign.errors import UserError as UserError  # here for all who need types anyway


@dataclass(frozen=True)
class Record:
    """One preference record as read from disk: a prompt, K images, and how good each is.

    `images` holds encoded files (JPEG, PNG, WebP bytes), never pixels, so that a record stays small.
    `utility` is higher-is-better: (1, 0) for a pair won by the first image, (0.5, 0.5) for a tie, any reals for a list.
    """

    id: int  # 63-bit hash of prompt, captions and image bytes: caches and randomness are addressed by it
    prompt: str
    images: tuple[bytes, ...]
    utility: tuple[float, ...]
    captions: tuple[str, ...] | None = None  # one per image where they differ from the prompt (DCPO)
    user: str | None = None
    split: str | None = None
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # scorer name -> a score per image
    meta: Mapping[str, Any] = field(default_factory=dict)
    user_embedding: tuple[float, ...] | None = None  # of `user`, where the data brings one (PPD)

    def caption(self, k: int) -> str:
        """The caption of candidate `k`: its own where the record has one, else the prompt."""
        return self.captions[k] if self.captions else self.prompt


@dataclass(frozen=True)
class Baseline:
    """Mean log-ratios without gradient: what KTO's and BCO's rewards are counted from."""

    mean: Float[Tensor, ""]  # of all images
    desirable: Float[Tensor, ""]  # of those of utility above 1/2
    undesirable: Float[Tensor, ""]  # of the others


@dataclass(frozen=True)
class Maps:
    """One draw's likelihoods by latent pixel: means over channels, whose means over pixels are the likelihoods'."""

    logp: Float[Tensor, "B K H W"]
    logp_ref: Float[Tensor, "B K H W"] | None = None
    kl: Float[Tensor, "B K H W"] | None = None
    activation: Float[Tensor, "B K H W"] | None = (
        None  # how far the reference's clean image is from its mean; no gradient
    )
    region: Float[Tensor, "B K H W"] | None = None  # the data's masks, in [0, 1]


@dataclass(frozen=True)
class Likelihoods:
    """All an objective may look at.

    `logp` is the mean over latent dimensions of a Gaussian log-density, up to constants that cancel:
    `-1/2 * mean squared error` for the ELBO. With it `beta` is Diffusion-DPO's beta digit for digit.
    """

    logp: Float[Tensor, "B K"]
    logp_ref: Float[Tensor, "B K"] | None
    utility: Float[Tensor, "B K"]
    mask: Bool[Tensor, "B K"]
    t: Float[Tensor, " B"] | None = None  # for metrics: the noise level, a mean over draws
    kl: Float[Tensor, "B K"] | None = None  # step KL to the reference, in units of logp; carries the gradient
    scores: Mapping[str, Float[Tensor, "B K"]] = field(default_factory=dict)  # the data's scorer columns
    draws: Sequence[Likelihoods] = ()  # each draw's own, of which the above are means; empty where there is one
    baseline: Baseline | None = None  # running means that the training loop keeps
    maps: Maps | None = None  # by latent pixel, of one draw; where likelihood.maps asks for them
    # of one draw, where likelihood.overlap asks: mean product of two candidates' residuals pred - target; no gradient
    overlap: Float[Tensor, "B K K"] | None = None
    logp_old: Float[Tensor, "B K"] | None = None  # under the weights that drew the recorded steps
    rate: Float[Tensor, " B"] | None = None  # 1 / |t - t_prev|, of normalized ratios: weighs policy gradients

    def each_draw(self) -> Sequence[Likelihoods]:
        """The independent draws that these are the mean of; itself where there is but one."""
        return self.draws or (self,)

    def select(self, candidates: Sequence[int]) -> Likelihoods:
        """The same prompts with these candidates alone, in this order.

        Raises:
            UserError: the records have fewer candidates.
        """
        if max(candidates) >= self.logp.shape[1]:
            raise UserError(
                f"the objective looks at candidate {max(candidates)} (from 0) and the records have"
                f" {self.logp.shape[1]}: make them with datasets_prep/conditions.py, or change objective.terms"
            )
        columns = list(candidates)

        def of(values: Any) -> Any:
            return None if values is None else values[:, columns]

        changed = {name: of(getattr(self, name)) for name in ("logp", "logp_ref", "logp_old", "utility", "mask", "kl")}
        maps = None if self.maps is None else Maps(*(of(values) for values in vars(self.maps).values()))
        return replace(
            self,
            **changed,
            maps=maps,
            overlap=None if self.overlap is None else self.overlap[:, columns][:, :, columns],
            scores={name: of(values) for name, values in self.scores.items()},
            draws=tuple(draw.select(candidates) for draw in self.draws),
        )

    @property
    def residual_overlap(self) -> Float[Tensor, "B K K"]:
        """The residuals' mean products.

        Raises:
            UserError: the likelihood was not asked for them.
        """
        if self.overlap is None:
            raise UserError("this objective compares the images' residuals: set likelihood.overlap=true")
        return self.overlap

    @property
    def by_pixel(self) -> Maps:
        """The likelihoods by latent pixel.

        Raises:
            UserError: the likelihood was not asked for them.
        """
        if self.maps is None:
            raise UserError("this objective looks at single latent pixels: set likelihood.maps=true")
        return self.maps

    @property
    def running(self) -> Baseline:
        """The running means.

        Raises:
            UserError: nobody keeps them.
        """
        if self.baseline is None:
            raise UserError(
                "this objective counts rewards from a running mean, which the training loop keeps: elsewhere give"
                " Likelihoods a baseline, or set objective.zero_from=batch (kto), objective.shift=batch (bco)"
            )
        return self.baseline

    @property
    def error(self) -> Float[Tensor, "B K"]:
        """The (weighted) squared error -2 * logp, the unit of the papers' e_w and e_l."""
        return -2.0 * self.logp

    @property
    def logratio(self) -> Float[Tensor, "B K"]:
        """logp - logp_ref.

        Raises:
            UserError: the run has no reference.
        """
        return self.logp - self.reference_logp

    @property
    def reference_logp(self) -> Float[Tensor, "B K"]:
        """logp_ref.

        Raises:
            UserError: the run has no reference.
        """
        if self.logp_ref is None:
            raise UserError("this objective compares with a reference: set reference.name to adapter_off or frozen")
        return self.logp_ref

    @property
    def old_logp(self) -> Float[Tensor, "B K"]:
        """logp_old.

        Raises:
            UserError: the likelihood is not of recorded steps.
        """
        if self.logp_old is None:
            raise UserError(
                "this objective compares with the weights that drew the steps: set likelihood.name=step and a source"
                " that records them (source.name=rollout)"
            )
        return self.logp_old

    @property
    def step_kl(self) -> Float[Tensor, "B K"]:
        """KL between policy's and reference's denoising step, 1/2 w mean (pred - pred_ref)^2: equal variances, so
        forward and reverse agree.

        Raises:
            UserError: the run has no reference.
        """
        if self.kl is None:
            raise UserError("this objective measures the distance to a reference: set reference.name to adapter_off")
        return self.kl

    def score(self, name: str) -> Float[Tensor, "B K"]:
        """The scores that the data has of one scorer.

        Raises:
            UserError: the data has no such column.
        """
        if name not in self.scores:
            has = ", ".join(self.scores) or "none"
            raise UserError(f"the data has no scores of {name!r} (it has {has}): run `diffalign score` and label again")
        return self.scores[name]


@dataclass(frozen=True)
class LossOutput:
    """A loss with what it was made of. The step's loss is the mean of `per_prompt` over the global batch."""

    per_prompt: Float[Tensor, " B"]  # 0 where the objective does not apply to a prompt
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # name -> [B], detached; NaN marks "does not apply"

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The mean over the prompts given."""
        return self.per_prompt.mean()


@runtime_checkable
class Schedule(Protocol):
    """How data becomes noise and back, for one family of processes. All tensors broadcast over a leading [N]."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]: ...
    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...
    def to_x0(self, pred: Tensor, xt: Tensor, t: Tensor) -> Tensor: ...
    def to_noise(self, pred: Tensor, xt: Tensor, t: Tensor) -> Tensor: ...
    def sample_t(self, u: Tensor, distribution: str) -> Tensor: ...
    def network_time(self, t: Tensor) -> Tensor: ...
    def weight(self, t: Tensor, name: str) -> Tensor: ...
    def reverse_step(self, pred: Tensor, xt: Tensor, t: Tensor, s: Tensor, eta: float) -> tuple[Tensor, Tensor]: ...


@runtime_checkable
class Denoiser(Protocol):
    """A network in its family's native target: `xt` [N C H W], `t` [N] in [0, 1], `cond` name -> [N, ...]."""

    schedule: Schedule

    def __call__(self, xt: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor: ...


class Policy(Denoiser, Protocol):
    """A denoiser that is trained; with an adapter, the same network without it."""

    denoiser: torch.nn.Module  # what a call runs: a launcher may wrap it, a frozen reference copies it

    def adapter_off(self) -> AbstractContextManager[None]: ...


class Reference(Protocol):
    """The model a policy is compared with."""

    def predict(self, xt: Tensor, t: Tensor, cond: Mapping[str, Tensor], ids: Tensor) -> Tensor | None: ...
    def after_step(self, step: int) -> None: ...


@dataclass(frozen=True)
class Setting:
    """What a source must know of the run: which rows are this process's, and how long it goes."""

    seed: int
    steps: int
    batch_size: int  # prompts per step over all processes
    rank: int = 0
    size: int = 1
    barrier: Callable[[], None] = lambda: None
    folder: Path = Path("runs")  # of the run: what a source makes while it trains goes below
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext  # the run's precision, for sampling

    @property
    def rows(self) -> range:
        """This process's rows of a global batch."""
        share = self.batch_size // self.size
        return range(self.rank * share, (self.rank + 1) * share)


class Batches(Protocol):
    """A source made ready. `batch(step)` is this process's share of the step's global batch, the same on every call.

    A source that samples with the policy cannot draw every step's batch beforehand: where `is_ready(step)` is false,
    every process calls `refresh(step)` first, between two optimizer steps; it returns numbers for the log.
    """

    def is_ready(self, step: int) -> bool: ...
    def refresh(self, step: int) -> Mapping[str, float]: ...
    def batch(self, step: int) -> Any: ...
    def holdout(self, num_prompts: int, batch_size: int) -> Iterator[Any]: ...
    def facts(self) -> Mapping[str, Any]: ...


class Source(Protocol):
    """Who is compared with whom."""

    gives: ClassVar[frozenset[str]]
    makes: str  # "images" or "steps": what likelihoods may take
    encoders: str  # what of the encoders stays on the device in training: "done" (none), "decoder", "needed" (all)

    def twin(self, stand_ins: Any) -> Source: ...  # on the smallest scale, for a dry run
    def training_rows(self, draws: int) -> int: ...  # of the network, per prompt of a batch
    def sampling_rows(self, batch_size: int) -> float: ...  # of the network, per optimizer step

    def prepare(self, policy: Any, reference: Reference, setting: Setting) -> Batches: ...


class Likelihood(Protocol):
    """Draws t and noise, runs policy and reference once each on the same inputs."""

    takes: str  # "images" or "steps"

    def __call__(self, policy: Denoiser, reference: Reference, batch: Any) -> Likelihoods: ...


class Objective(Protocol):
    """Pure arithmetic on `Likelihoods`. `needs` is checked before any weight is loaded."""

    needs: ClassVar[frozenset[str]]

    def __call__(self, likelihoods: Likelihoods) -> LossOutput: ...


@dataclass(frozen=True)
class ScorerInfo:
    """What a score means; part of every cache key and report."""

    name: str
    version: str
    inputs: tuple[str, ...]  # of "image", "prompt"
    unit: str
    expected_range: tuple[float, float]
    differentiable: bool = False


class Scorer(Protocol):
    """Scores N images against N prompts; float32 [N], higher is better."""

    info: ScorerInfo

    def score(self, images: list[Any], prompts: list[str]) -> Float[Tensor, " N"]: ...
