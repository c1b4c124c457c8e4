"""The sections of a config: one frozen dataclass each, with its defaults and the rules for its own values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from diffalign.errors import UserError

TABS = ("compare", "vote", "leaderboard", "browse", "watch", "train")
User = str | int | dict[str | int, float] | None


@dataclass(frozen=True)
class Train:
    """The training loop. Batch sizes count prompts (pairs), over all devices unless said otherwise."""

    out: str | None = None  # run folder; runs/<names of the config files> where not given
    steps: int = 1000  # optimizer steps
    batch_size: int = 64  # prompts per optimizer step, over all devices
    micro_batch_size: int | None = None  # prompts per device and forward call; default: the device's whole share
    lr: float = 1e-5
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8  # of adamw and adamw8bit; gradients that are not well above it move nothing
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    ema: float = 0.0  # decay per step of the exported weights' moving average; 0 is off
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where the GPU has it, else fp32
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    validate_every: int = 100  # steps between held-out preference accuracies; 0 is off
    validate_prompts: int = 256  # held-out prompts used, at most
    validate_draws: int = 4  # noise levels per held-out prompt
    sample_every: int = 0  # steps between sample grids; 0: only at the end
    sample_prompts: tuple[str, ...] = ()  # default: the first held-out prompts

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "keep_checkpoints", "validate_draws"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} must be at least 1 (got {getattr(self, name)})")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise UserError(f"train.micro_batch_size must be at least 1 (got {self.micro_batch_size})")
        if not self.adam_eps > 0:
            raise UserError(f"train.adam_eps must be positive (got {self.adam_eps})")
        if not 0 <= self.ema < 1:
            raise UserError(f"train.ema must lie in [0, 1) (got {self.ema})")


@dataclass(frozen=True)
class TrainScorer:
    """Bradley-Terry training of a CLIP-type scorer on pairs; the defaults are those of SPO's step-aware model.

    With `step_aware` the pictures compared are previews: both of a pair noised alike, and what the frozen `model`
    section's network, guided by `cfg_scale`, takes for the clean picture. With `head=general` pictures are embedded and
    compared two at a time (arXiv 2410.02197), so that preferences in a circle can be learned.
    """

    data: dict[str, Any] = field(default_factory=dict)  # path, and name and fields as source.data; ties are kept
    base: str | None = None  # a CLIP folder or hub id, a weights file in transformers' or open_clip's layout, an export
    architecture: str | None = None  # open_clip's name or JSON of a weights file that has no config.json beside it
    processor: str | None = None  # where tokenizer and preprocessor_config.json are, if not in `base` or beside it
    head: Literal["score", "general"] = "score"  # a score per picture, or a general preference of two
    head_dim: int = 8  # of the general preference's embedding: even; 2 is the least
    out: str | None = None  # run folder; runs/<names of the config files>-scorer where not given
    step_aware: bool = False
    cfg_scale: float = 5.0  # of the previews; 1 is off
    resize: Literal["antialiased", "spo"] = "spo"  # of previews, for the tower
    cache_dir: str = "cache"  # of the latents and text embeddings that previews are made of
    labels: Literal["data", "scorer"] = "data"  # scorer: another scorer's verdict on the clean pictures
    label_scorer: str | dict[str, Any] | None = None  # its name, or name and fields
    label_scale: float = 1.0  # its scores times this are logits
    tie_gap: float = 0.1  # probabilities of the two that differ by no more are a tie
    prompt_weights: bool = True  # a pair counts 1 / (training pairs of its prompt), normalised over the batch
    holdout: float = 0.05  # share of the prompts kept out of training for validation
    steps: int = 8000  # optimizer steps
    batch_size: int = 64  # pairs per optimizer step
    micro_batch_size: int | None = None  # pairs per forward call; default: all
    lr: float = 3e-6
    modulation_lr: float | None = None  # of what a step-aware scorer learns of the timestep, from zero; default: lr
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = 500
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.3
    max_grad_norm: float | None = 1.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    validate_every: int = 500  # steps between held-out accuracies; 0 is off
    validate_pairs: int = 512  # held-out pairs used, at most
    validate_timesteps: tuple[int, ...] = (0, 251, 501, 701, 951)  # of previews, in the network's time

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"train_scorer.{name} must be at least 1 (got {getattr(self, name)})")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise UserError(f"train_scorer.micro_batch_size must be at least 1 (got {self.micro_batch_size})")
        if self.modulation_lr is not None and not (self.step_aware and self.lr > 0):
            raise UserError(
                "train_scorer.modulation_lr is for train_scorer.step_aware, and wants a train_scorer.lr above 0"
            )
        if not 0 <= self.tie_gap < 1:
            raise UserError(f"train_scorer.tie_gap is a difference of probabilities in [0, 1) (got {self.tie_gap})")
        if (self.labels == "scorer") != (self.label_scorer is not None):
            raise UserError("train_scorer.label_scorer and train_scorer.labels=scorer go together: give both or none")
        if self.head_dim < 2 or self.head_dim % 2:
            raise UserError(f"train_scorer.head_dim must be even and at least 2 (got {self.head_dim})")
        if self.head == "general" and self.step_aware:
            raise UserError("train_scorer.head=general compares finished pictures: it goes without step_aware")


@dataclass(frozen=True)
class Sampling:
    """How images are made: shared by `generate`, by `evaluate` and by the sample grids of `train`."""

    sampler: Literal["default", "ddim", "ddpm", "euler", "flow-euler", "flow-sde"] = "default"
    num_steps: int = 25
    cfg_scale: float = 5.0
    eta: float = 0.0
    batch_size: int = 16  # images per call


@dataclass(frozen=True)
class Generate:
    """Prompts to images. Every image is addressed by (seed, prompt, its number), so models can be compared on it."""

    # a text file (one per line), a JSONL file with `prompt`, sprites:<split>:<n>[:kind], or a prompt set
    prompts: str | dict[str, Any] | None = None
    out: str | None = None
    adapter: str | None = None  # an exported LoRA
    adapter_scale: float = 1.0
    user: User = None  # whose pictures, for an adapter with a user branch: an id, or {id: weight}, weights of sum 1
    user_data: str | None = None  # records of those users: their pairs (few-shot), or their embeddings
    user_shots: int | None = None  # pairs of each user that are looked at; default: all in user_data
    images_per_prompt: int = 4  # of every variant
    seed: int = 0
    # several ways to make the pictures, each in a subfolder: as, model (a config's name, or keys), sampling, adapter,
    # adapter_scale, user, user_data, user_shots, seed; {} is the command's own
    vary: tuple[dict[str, Any], ...] = ()
    only: tuple[str, ...] = ()  # files of the manifest: these alone are made
    select: str | dict[str, Any] | None = None  # best-of-n, parm, or {name: ..., its keys}; default: all are kept
    candidates: int = 4  # of each picture that is kept, where there is a selection
    scorers: tuple[str | dict[str, Any], ...] = ()  # that select, as in `score`
    weights: tuple[float, ...] = ()  # of each scorer in their sum; default: 1
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        for name in ("images_per_prompt", "candidates"):
            if getattr(self, name) < 1:
                raise UserError(f"generate.{name} must be at least 1 (got {getattr(self, name)})")
        if self.select is not None and not self.scorers:
            raise UserError("generate.scorers is missing: generate.select needs them to judge candidates")
        if self.select is None and self.scorers:
            raise UserError("generate.scorers select nothing while generate.select is empty: set best-of-n or parm")
        if self.weights and len(self.weights) != len(self.scorers):
            raise UserError(f"generate.weights has {len(self.weights)} numbers for {len(self.scorers)} scorers")


@dataclass(frozen=True)
class Score:
    """Scorers over pictures."""

    images: str | None = None  # a folder that `generate` wrote; with score.prompts any folder of pictures
    # text: the prompt of each picture, a line each, in the order of their names; or JSONL with `file` and `prompt`
    prompts: str | None = None
    scorers: tuple[str | dict[str, Any], ...] = ("sprites_gold",)  # names, or {name: ..., as: ..., its fields}
    out: str | None = None  # default: scores.jsonl in the images folder
    cache: bool = True  # keep scores for all later runs; off: only until this run has ended
    cache_dir: str | None = None  # default: $DIFFALIGN_CACHE, else diffalign in the user's cache folder
    batch_size: int = 64  # pictures a scorer is asked at once; its own batch_size is what its network sees
    workers: int = 4  # threads that decode pictures
    retry: bool = False  # ask again for what could not be read or judged in an earlier run
    strict: bool = False  # what cannot be read or judged is an error; off: counted and skipped

    def __post_init__(self) -> None:
        for name in ("batch_size", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"score.{name} must be at least 1 (got {getattr(self, name)})")


@dataclass(frozen=True)
class Label:
    """From scores to preference records. docs/labelling.md shows the rules side by side."""

    scores: str | None = None  # scores.jsonl that `score` wrote
    scorer: str | None = None  # the one that labels; default: the only one there
    scorers: tuple[str, ...] = ()  # several that label together; default with another `prefer` than sum: all there
    # how several make one preference: weighted sum; votes: share of comparisons won (Syn-Pic, 2410.18013); maximin:
    # worst standardised score (DSTC); pareto: nowhere worse, somewhere better; jury: majority of scorers; pairwise: no
    # scores, but the probabilities of `judge`
    prefer: Literal["sum", "votes", "maximin", "pareto", "jury", "pairwise"] = "sum"
    judge: str | dict[str, Any] | None = None  # pairwise: {name: general_preference, path: ...}
    weights: tuple[float, ...] = ()  # of each of `scorers`, for sum and pareto; default 1 each
    # best-vs-rest: the best against each other one (Curry-DPO); ranking: one list per prompt; singles: each image
    # liked (1) or not (0); ladder: the best image above corrupted copies of itself
    rule: Literal["best-worst", "best-vs-rest", "all-pairs", "ranking", "singles", "ladder"] = "best-worst"
    # of pairs: (1, 0); soft: probabilities to win; sampled: (1, 0) to a winner drawn with that probability
    labels: Literal["hard", "soft", "sampled"] = "hard"
    # of soft and sampled: sigmoid(gap / temperature); a jury's probability is its vote share, pairwise has its own
    temperature: float = 1.0
    min_margin: float = 0.0  # pairs whose scores differ by no more are not made; of singles, images as near to the cut
    min_agreement: float = 0.5  # jury: share of the scorers that must have voted for the winner
    like_above: float | None = None  # singles: liked where the utility exceeds this
    like_quantile: float | None = None  # singles: the cut is this quantile of all images; default 0.5
    by_users: bool = False  # every scorer of the file labels, as a user of its own name; label.scorer names none
    # a caption per image (DCPO): JSONL of {file, caption} in the order of the scores, or who is to write it:
    # {name: vlm, path: ..., question: ... with {prompt} in it or not}
    captions: str | dict[str, Any] | None = None
    perturb: float = 0.0  # share of the words of each loser's caption that are dropped or moved (DCPO-p, DCPO-h)
    degrade: Literal["blur", "jpeg", "noise", "downscale", "fade"] = "blur"  # ladder: what corrupts
    levels: int = 3  # ladder: corrupted copies, each worse than the one before
    humans: int = 0  # so many of the least certain pairs go to people, into <out>/queue, and are not labelled here
    sheet: int = 12  # pairs that contact_sheet.html shows of the least and of the most certain; 0: no page
    seed: int = 0  # of drawn labels, perturbed captions and corruptions
    out: str | None = None  # folder of records; default: pairs beside the scores

    def __post_init__(self) -> None:
        if self.scorer is not None and self.scorers:
            raise UserError("label.scorer and label.scorers both name who labels: give one of them")
        if (self.prefer == "pairwise") != (self.judge is not None):
            raise UserError("label.prefer=pairwise and label.judge, who compares, go together: give both or none")
        if self.judge is not None and (self.scorer is not None or self.scorers):
            raise UserError("label.judge labels alone: leave label.scorer and label.scorers out")
        if self.weights and self.prefer not in ("sum", "pareto"):
            raise UserError(f"label.weights are for sum and pareto: leave them out with label.prefer={self.prefer}")
        if not self.temperature > 0:
            raise UserError(f"label.temperature must be above 0 (got {self.temperature})")
        if self.min_margin < 0:
            raise UserError(f"label.min_margin must be at least 0 (got {self.min_margin})")
        if not 0 <= self.min_agreement <= 1:
            raise UserError(f"label.min_agreement is a share of the scorers in [0, 1] (got {self.min_agreement})")
        if self.like_quantile is not None and not 0 < self.like_quantile < 1:
            raise UserError(f"label.like_quantile must lie in (0, 1) (got {self.like_quantile})")
        if self.like_above is not None and self.like_quantile is not None:
            raise UserError("label.like_above and label.like_quantile both say what is liked: give one of them")
        if not 0 <= self.perturb <= 1:
            raise UserError(f"label.perturb is a share of the words in [0, 1] (got {self.perturb})")
        for name, least in (("levels", 1), ("humans", 0), ("sheet", 0)):
            if getattr(self, name) < least:
                raise UserError(f"label.{name} must be at least {least} (got {getattr(self, name)})")
        self._check_rule()

    def _check_rule(self) -> None:
        is_pairs = self.rule in ("best-worst", "best-vs-rest", "all-pairs")
        for name in ("labels", "perturb", "humans"):
            if not is_pairs and getattr(self, name) not in ("hard", 0):
                raise UserError(f"label.{name} is for pairs: leave it out with label.rule={self.rule}")
        if not is_pairs and self.prefer in ("pareto", "jury"):
            raise UserError(
                f"label.prefer={self.prefer} compares two images and orders none: with label.rule={self.rule} take"
                " sum, votes or maximin"
            )
        if self.rule != "singles" and (self.like_above is not None or self.like_quantile is not None):
            raise UserError("label.like_above and label.like_quantile are for label.rule=singles")
        if self.by_users and (self.prefer != "sum" or self.humans):
            raise UserError("label.by_users keeps scorers apart: leave out label.prefer and label.humans")


@dataclass(frozen=True)
class Filter:
    """Drops the pairs most likely to displace their own winner, by CHES (arXiv 2410.08847), from `source.data.path`."""

    drop: float = 0.05  # share of the pairs, those with the highest scores; 0 only writes the scores
    draws: int = 4  # noise levels (and noises) per pair, shared by its images, over which the score is averaged
    layer: str | None = None  # whose input is read; default: the denoiser's output projection, conv_out or proj_out
    length_normalize: bool = True  # means over spatial tokens for sums, so that picture sizes do not matter
    batch_size: int = 8  # pairs per forward call
    out: str | None = None  # folder of records; default: runs/<names of the config files>-filtered
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise UserError(f"filter.drop must lie in [0, 1): it is a share of the pairs (got {self.drop})")
        for name in ("draws", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"filter.{name} must be at least 1 (got {getattr(self, name)})")


@dataclass(frozen=True)
class Stages:
    """Several runs of `train` one after another, each from the weights of the one before; one stage is plain training.

    `train.steps`, its learning rate schedule and the optimizer are those of each stage.
    """

    num: int = 1
    refresh: bool = False  # the reference of a stage is the policy it starts from; off: that of the first stage
    # Accelerated PO (arXiv 2410.06293): after a stage, weights + momentum * (weights - those after the stage before)
    momentum: float = 0.0
    max_rank: int | None = None  # LoRA: momentum's growing rank is cut to this by SVD; default: exact
    # which pairs a stage sees: all of them in each, or each pair in exactly one stage
    order: Literal["all", "easy-to-hard", "hard-to-easy", "random"] = "all"
    by: str | None = None  # score column whose gap winner - loser says how easy; utility; default: the only scorer
    split: Literal["quantiles", "prompts"] = "quantiles"  # of all pairs, or of each prompt's (Curry-DPO)

    def __post_init__(self) -> None:
        if self.num < 1:
            raise UserError(f"stages.num must be at least 1 (got {self.num})")
        if not 0 <= self.momentum <= 1:
            raise UserError(f"stages.momentum must lie in [0, 1] (got {self.momentum})")
        if self.momentum and not self.refresh:
            raise UserError("stages.momentum moves the reference too: set stages.refresh=true")
        if self.max_rank is not None and (self.max_rank < 1 or not self.momentum):
            raise UserError("stages.max_rank cuts the rank that stages.momentum adds: at least 1, with momentum")
        if self.by is not None and self.order not in ("easy-to-hard", "hard-to-easy"):
            raise UserError(f"stages.by orders nothing while stages.order={self.order}: set easy-to-hard")
        if self.split != "quantiles" and self.order == "all":
            raise UserError(f"stages.split={self.split} divides nothing while stages.order=all: set easy-to-hard")


@dataclass(frozen=True)
class Evaluate:
    """Same prompts and seeds for all models; the first is the baseline."""

    # as generate.prompts; a set of published prompts may be pinned: {name: partiprompts, path: ..., sha256: ...}
    prompts: str | dict[str, Any] | None = None
    adapters: tuple[str, ...] = ()  # exported LoRA folders; the base model comes first by itself
    models: tuple[str, ...] = ()  # whole other models: a config's name, or a folder of the configured architecture
    names: tuple[str, ...] = ()  # of adapters, then of models; default: the run folders' and the configs' names
    scorers: tuple[str | dict[str, Any], ...] = ("sprites_gold",)  # names, or {name: ..., as: ..., its fields}
    # judges that training saw, beside those found in the run folders: reported apart, never concluded from
    train_scorers: tuple[str, ...] = ()
    ground_truth: tuple[str, ...] = ("sprites_gold",)  # exact judges: training on them is told, the verdict stands
    features: str | dict[str, Any] | None = None  # of pictures, for diversity and drift: a CLIP-type scorer's; pixels
    user: User = None  # of the adapters' pictures, as in `generate`; the base has no users
    user_data: str | None = None
    user_shots: int | None = None
    seeds: int = 1  # images per prompt
    seed: int = 1000
    out: str | None = None
    run: str | None = None  # a training run whose curves and facts go into the report
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"evaluate.seeds must be at least 1 (got {self.seeds})")


@dataclass(frozen=True)
class Export:
    """A run's trained weights in other tools' formats."""

    run: str | None = None
    out: str | None = None
    format: Literal["diffusers", "kohya"] = "diffusers"
    step: int | None = None  # default: the newest checkpoint


@dataclass(frozen=True)
class Stop:
    """When `train` ends before its last step, which weights it exports, and the over-optimisation alarm; off as it is.

    A measurement is a validation (`train.validate_every`) for holdout/..., a sample grid (`train.sample_every`) for
    samples/...
    """

    metric: str | None = None  # holdout/<name>, samples/<scorer> or samples/diversity: its best checkpoint is kept
    mode: Literal["max", "min"] = "max"  # which way the metric is better
    patience: int = 0  # measurements in a row without improvement after which training ends; 0: never
    min_delta: float = 0.0  # an improvement is more than this, in the metric's unit
    restore_best: bool = False  # export the weights that measured best instead of the last
    scorers: tuple[str, ...] = ()  # judge the sample grids
    seeds: int = 1  # pictures per sample prompt; from 2 on, diversity is that of a prompt's pictures
    # YAML reads a bare off as false
    alarm: Annotated[
        Literal["off", "warn", "stop", "rollback"], BeforeValidator(lambda value: "off" if value is False else value)
    ] = "off"
    train_scorer: str | None = None  # the one whose rise the alarm distrusts: what the labels came from
    held_out_scorers: tuple[str, ...] = ()  # default: all others of `scorers`

    def __post_init__(self) -> None:
        for name, least in (("patience", 0), ("min_delta", 0), ("seeds", 1)):
            if getattr(self, name) < least:
                raise UserError(f"stop.{name} must be at least {least} (got {getattr(self, name)})")
        if self.metric is None:
            for key, is_set in (
                ("patience", self.patience > 0),
                ("restore_best", self.restore_best),
                ("alarm=rollback", self.alarm == "rollback"),
            ):
                if is_set:
                    raise UserError(f"stop.{key} needs stop.metric, which says what best is: holdout/implicit_accuracy")
        elif not self.metric.startswith(("holdout/", "samples/")):
            raise UserError(f"stop.metric must be holdout/<name> or samples/<scorer> (got {self.metric!r})")
        if self.alarm == "off":
            return
        if self.train_scorer is None:
            raise UserError("stop.alarm needs stop.train_scorer, one of stop.scorers")
        for key, names in (("train_scorer", (self.train_scorer,)), ("held_out_scorers", self.held_out_scorers)):
            for scorer in names:
                if scorer not in self.scorers:
                    raise UserError(f"stop.{key}: {scorer!r} is not in stop.scorers ({', '.join(self.scorers) or '-'})")
        if self.train_scorer in self.held_out_scorers:
            raise UserError(f"stop.held_out_scorers: {self.train_scorer!r} is stop.train_scorer, so it is not held out")

    @property
    def decides(self) -> bool:
        """Whether anything beside logging is switched on."""
        return self.metric is not None or self.alarm != "off"


@dataclass(frozen=True)
class Sweep:
    """Several settings of one run, trained and judged on the same prompts and noise. One of key, grid and points.

    A setting may change keys of model (not its name or path), source, likelihood, reference, objective, train and stop.
    """

    key: str | None = None  # the one that varies: objective.beta
    values: tuple[Any, ...] = ()  # of `key`
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # key -> values; every combination is a setting
    points: tuple[dict[str, Any], ...] = ()  # each a setting: key -> value
    seeds: tuple[int, ...] = ()  # of training, for every setting; default: train.seed
    axes: tuple[str, ...] = ()  # two of evaluate.scorers, the front's; default: the first two
    out: str | None = None  # default: runs/<names of the config files>-sweep

    def __post_init__(self) -> None:
        given = [name for name in ("key", "grid", "points") if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f"sweep.{given[0]} and sweep.{given[1]} both say what varies: give one of them")
        if bool(self.key) != bool(self.values):
            missing, there = ("values", "key") if self.key else ("key", "values")
            raise UserError(f"sweep.{missing} is missing: sweep.{there} needs it")
        for key, values in self.grid.items():
            if not values:
                raise UserError(f"sweep.grid: {key} has no values")
        if any(not point for point in self.points):
            raise UserError("sweep.points holds an empty setting: give each a mapping of keys to values")
        if len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"sweep.seeds must differ (got {', '.join(map(str, self.seeds))})")
        if self.axes and (len(self.axes) != 2 or self.axes[0] == self.axes[1]):
            raise UserError(f"sweep.axes must be two different scorers (got {', '.join(self.axes)})")


@dataclass(frozen=True)
class Log:
    """Where metrics go beside metrics.jsonl."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    project: str = "diffalign"
    every: int = 1  # steps between lines


@dataclass(frozen=True)
class Agree:
    """How often scorers agree with the recorded preferences of people, by a named rule."""

    data: dict[str, Any] = field(default_factory=dict)  # path, and name and fields as source.data; ties are kept
    scorers: tuple[str | dict[str, Any], ...] = ()  # names, or {name: ..., as: ..., its fields}
    # pickapic: ties are predicted within `tie_gap`; imagereward: pooled, ties of people dropped; hps-ir: the same per
    # prompt; hpdv2: inversions, ties right; strict: pooled, all ties dropped
    rule: Literal["pickapic", "imagereward", "hps-ir", "hpdv2", "strict"] = "strict"
    tie_gap: float | None = None  # pickapic: probabilities that differ by no more are a tie; default: fitted
    validation: dict[str, Any] = field(default_factory=dict)  # pickapic: the records that `tie_gap` is fitted on
    scale: dict[str, float] = field(default_factory=dict)  # pickapic: scorer -> what makes its scores logits; default 1
    out: str | None = None  # folder of agree.json; default: runs/agree

    def __post_init__(self) -> None:
        if self.tie_gap is not None and not 0 <= self.tie_gap <= 1:
            raise UserError(f"agree.tie_gap is a difference of probabilities in [0, 1] (got {self.tie_gap})")
        if self.rule == "pickapic" and (self.tie_gap is None) == (not self.validation):
            raise UserError("agree.rule=pickapic: give agree.tie_gap, or records in agree.validation to fit it on")


@dataclass(frozen=True)
class App:
    """The Gradio app. It reads files below `roots` alone, and writes below `folder` alone."""

    folder: str = "runs/app"  # votes.db, comparisons, drafts and versions of data sets, logs of runs
    roots: tuple[str, ...] = ("runs",)  # folders whose runs, pictures and data sets may be looked at
    tabs: tuple[str, ...] = ()  # those that are shown: compare, vote, leaderboard, browse, watch, train; default: all
    host: str = "127.0.0.1"  # another address wants a password
    port: int = 7860  # 0: any free one
    share: bool = False  # a public link through gradio's servers; wants a password
    password: str | None = None  # of every visitor, whose user name is the rater's; better in $DIFFALIGN_APP_PASSWORD
    max_upload: int = 20  # megabytes of a file that a visitor sends
    max_pictures: int = 256  # of one comparison
    max_queue: int = 64  # requests that wait; more are refused
    max_runs: int = 1  # trained at once
    aspects: tuple[str, ...] = ()  # of a vote, beside the overall one
    reveal: bool = True  # whether the leaderboard names the models

    def __post_init__(self) -> None:
        for unknown in set(self.tabs) - set(TABS):
            raise UserError(f"app.tabs: {unknown!r} is none of {', '.join(TABS)}")
        if not 0 <= self.port <= 65535:
            raise UserError(f"app.port must lie in [0, 65535] (got {self.port})")
        for name in ("max_upload", "max_pictures", "max_queue", "max_runs"):
            if getattr(self, name) < 1:
                raise UserError(f"app.{name} must be at least 1 (got {getattr(self, name)})")
        if len(set(self.aspects)) != len(self.aspects) or "" in self.aspects:
            raise UserError(f"app.aspects must be different names (got {', '.join(map(repr, self.aspects))})")


SECTIONS = {
    "train": Train,
    "train_scorer": TrainScorer,
    "sampling": Sampling,
    "generate": Generate,
    "score": Score,
    "label": Label,
    "agree": Agree,
    "filter": Filter,
    "stages": Stages,
    "evaluate": Evaluate,
    "export": Export,
    "stop": Stop,
    "sweep": Sweep,
    "log": Log,
    "app": App,
}
