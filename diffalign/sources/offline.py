"""Recorded preferences: pairs, lists or single images on disk, encoded once, drawn in an addressed order."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

from diffalign.data import OnTheFly, build_cache
from diffalign.registry import build, check_fields, find
from diffalign.sources._batches import RecordedBatches
from diffalign.types import Setting, UserError


@dataclass(frozen=True)
class Offline:
    """Preference records from a file or folder.

    data: a section of its own: `path`, and `name` where the layout is not to be detected (`diffalign list data`).
    cache: encode VAE latents and text once into `cache_dir`; false encodes every batch anew, with equal numbers.
    cache_dtype: float16 halves the disk; training reads the same rounded values with and without the cache.
    buckets: `square` crops, or `aspect`: each record in the aspect ratio nearest to its images.
    flip: mirror whole records at random, all candidates together. Off: captions say left and right.
    prompt_dropout: share of draws whose captions are replaced by what inference takes as unconditional, for CFG. One
        draw per record, as in the Salesforce code (0.2 there; the diffusers script has none).
    holdout: share of the prompts kept out of training for the preference accuracy.
    """

    data: dict[str, Any] = field(default_factory=dict)
    cache: bool = True
    cache_dir: str = "cache"
    cache_dtype: Literal["float16", "float32"] = "float16"
    buckets: Literal["square", "aspect"] = "square"
    flip: bool = False
    prompt_dropout: float = 0.0
    holdout: float = 0.05
    encode_batch_size: int = 8

    gives: ClassVar[frozenset[str]] = frozenset({"pair", "list", "scores"})

    def __post_init__(self) -> None:
        spec = self._spec
        check_fields(find("data", spec["name"]), {k: v for k, v in spec.items() if k != "name"}, "source.data")
        if not 0 <= self.prompt_dropout < 1:
            raise UserError(f"source.prompt_dropout must lie in [0, 1) (got {self.prompt_dropout})")

    @property
    def _spec(self) -> dict[str, Any]:
        return {"name": "auto", **self.data}

    @cached_property
    def reader(self) -> Any:
        """The opened data set.

        Raises:
            UserError: no path, or nothing usable there.
        """
        if not self.data.get("path"):
            raise UserError("source.data.path is missing: a Parquet or JSONL file, or a folder of pairs")
        return build("data", self._spec)

    def check(self) -> None:
        """Opens the data, so that a wrong path is reported before any weight is loaded."""
        _ = self.reader

    def prepare(self, policy: Any, setting: Setting) -> RecordedBatches:
        """Builds or opens the cache with the policy's encoders.

        Raises:
            UserError: unusable data, no disk space, or fewer training records than one.
        """
        how: dict[str, Any] = {
            "resolution": policy.resolution,
            "buckets": self.buckets,
            "flip": self.flip,
            "dtype": self.cache_dtype,
            "progress": setting.rank == 0,
        }
        if self.cache:
            data: Any = build_cache(
                self.reader,
                policy,
                self.cache_dir,
                batch_size=self.encode_batch_size,
                rank=setting.rank,
                world_size=setting.size,
                **how,
            )
        else:
            data = OnTheFly(self.reader, policy, **how)
        return RecordedBatches(self, data, policy, setting)
