"""What every model of a sweep is judged by; scores are kept, so that finished runs are not judged twice."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffalign._json import read_json, write_json
from diffalign.config import Config, Generate
from diffalign.distributed import World
from diffalign.recipes.evaluate import score_folder
from diffalign.recipes.generate import MANIFEST, load_for_images, read_manifest, write_images
from diffalign.recipes.sweep._results import Scores
from diffalign.types import Scorer, UserError


@dataclass(frozen=True)
class Jury:
    """What every model of a sweep is judged by: the same prompts, noises and scorers."""

    prompts: list[str]
    scorers: dict[str, Scorer]
    folder: Path  # of the sweep
    quiet: bool

    def scores(self, config: Config, adapter: str | None, name: str) -> Scores:
        """Scores of a model's images, from disk where they were made before. `name` is that of files.

        Raises:
            UserError: an unusable adapter, or a scorer that cannot judge.
        """
        path = self.folder / "scores" / f"{name}.json"
        # the folder belongs to one config; what that does not hold is here
        texts = hashlib.blake2b("\n".join(self.prompts).encode(), digest_size=8).hexdigest()
        mark = {"prompts": texts, "scorers": {key: scorer.info.version for key, scorer in self.scorers.items()}}
        found = read_json(path)
        if found and found["mark"] == mark:
            return {key: np.array(values) for key, values in found["scores"].items()}
        settings, images = config.evaluate, self.folder / "images" / name
        world = World(settings.device, "auto")
        how = Generate(images_per_prompt=settings.seeds, seed=settings.seed, device=settings.device)
        model = load_for_images(config, adapter, 1.0, world)
        write_images(model, self.prompts, images, how, config.sampling, world, self.quiet, f"sample {name}")
        scores = score_folder(images, self.scorers, config.score, world, name, self.quiet)
        if world.is_main:
            write_json(path, {"mark": mark, "scores": scores})
        world.close()
        return scores

    def check_prompts(self, name: str) -> None:
        """Refuses prompts that changed inside a file of the same name: settings would be compared on different ones.

        Raises:
            UserError: the model's images there are of others.
        """
        images = self.folder / "images" / name
        if (images / MANIFEST).is_file():
            old = {row["prompt_id"]: row["prompt"] for row in read_manifest(images)}
            if list(old.values()) != self.prompts:
                raise UserError("evaluate.prompts are others than when the sweep began: choose another sweep.out")
