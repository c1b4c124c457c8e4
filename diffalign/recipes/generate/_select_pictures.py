"""Pictures chosen among candidates while they are sampled, and what it took of the network and of the scorers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffalign.config import Sampling
from diffalign.models._preview import decoder
from diffalign.recipes._images import decoded, sample_latents
from diffalign.recipes.generate._select import KEY, Judges, Selection
from diffalign.recipes.generate._select_paths import Paths, Verdicts, best
from diffalign.sampling import SamplerStep
from diffalign.sections import Generate
from diffalign.types import UserError

Pixels = UInt8[NDArray[np.uint8], "H W 3"]


@dataclass
class Kept:
    """A picture's best candidate so far. `utility` is -inf where no scorer had a number."""

    pixels: Pixels
    utility: float
    scores: dict[str, float | None]
    candidate: int  # the number that addresses its noise
    prompt: str  # it was sampled with: the user's, or a revised one
    finished: int  # candidates that were sampled to the end
    evaluations: int  # of the network, by all candidates: 1 a step, 2 with guidance
    judged: Counter[str] = field(default_factory=Counter)  # question -> pictures and previews that were asked about
    reflections: int = 0
    latest: Pixels | None = None  # what the last revised prompt made


class Chooser:
    """Makes pictures `numbers[i]` of `prompts[i]`, each the best of `generate.candidates`.

    Candidate c of picture k has the noise of the plain picture k + c * images_per_prompt: candidate 0 is what is made
    without selection, more candidates contain those of fewer, and no two pictures share one.
    """

    def __init__(
        self,
        model: Any,
        settings: Generate,
        sampling: Sampling,
        selection: Selection,
        judges: Judges,
        user: Mapping[str, Tensor] | None,
    ) -> None:
        self.model, self.settings, self.sampling = model, settings, sampling
        self.selection, self.judges, self.user = selection, judges, user
        self.check_at = selection.steps(sampling.num_steps)
        self.decode = None
        if selection.checks:
            try:
                self.decode = decoder(model, selection.preview)
            except UserError as error:
                raise UserError(str(error).replace("source.preview", f"{KEY}.preview")) from error

    def __call__(self, prompts: Sequence[str], numbers: Sequence[int]) -> list[tuple[Pixels, dict[str, Any]]]:
        """(pixels, facts for the manifest) of each. One call: the caller makes batches."""
        kept = self._choose(prompts, prompts, numbers)
        open_ones = list(range(len(prompts)))
        for _ in range(self.selection.reflections if self.selection.hook else 0):
            revised = {i: self._revised(kept[i], prompts[i]) for i in open_ones}
            open_ones = [i for i in open_ones if revised[i]]
            if not open_ones:
                break
            asked = [prompts[i] for i in open_ones]
            news = self._choose([str(revised[i]) for i in open_ones], asked, [numbers[i] for i in open_ones])
            for i, new in zip(open_ones, news, strict=True):
                kept[i] = _better(kept[i], new)
        return [(one.pixels, self._facts(one, prompt)) for one, prompt in zip(kept, prompts, strict=True)]

    def _revised(self, kept: Kept, prompt: str) -> str | None:
        assert self.selection.hook is not None
        revised = self.selection.hook(Image.fromarray(kept.pixels if kept.latest is None else kept.latest), prompt)
        if revised is not None and not isinstance(revised, str):
            raise UserError(f"{KEY}.reflect={self.selection.reflect}: must return text or None (got {revised!r})")
        kept.judged["reflection"] += 1
        return revised

    # One round of candidates

    @torch.no_grad()
    def _choose(self, sampled: Sequence[str], asked: Sequence[str], numbers: Sequence[int]) -> list[Kept]:
        """The best candidate of each picture: sampled with one prompt, judged by another."""
        n = self.settings.candidates
        texts = [prompt for prompt in sampled for _ in range(n)]
        draws = [k + c * self.settings.images_per_prompt for k in numbers for c in range(n)]
        verdicts = Verdicts(self.selection, len(sampled), n)
        paths = Paths(self.model, len(texts), self.sampling.batch_size)
        counts = [Counter[str]() for _ in sampled]

        def on_step(step: SamplerStep) -> None:
            if step.index in self.check_at:
                self._check(step, verdicts, asked, counts)
                paths.is_alive = torch.from_numpy(verdicts.is_alive.reshape(-1).copy())

        seed = self.settings.seed
        latents = sample_latents(self.model, texts, draws, seed, self.sampling, self.user, paths, on_step)
        pixels, scores = self._judged(latents, verdicts, asked, counts)
        utility = np.full(verdicts.is_alive.shape, -np.inf)
        values = self.judges.outcome.utility(scores)
        utility[verdicts.is_alive] = np.where(np.isnan(values), -np.inf, values)
        place = np.cumsum(verdicts.is_alive.reshape(-1)).reshape(-1, n) - 1  # of a candidate among the finished
        evaluations = paths.evaluations.reshape(-1, n).sum(dim=1).tolist()
        kept = []
        for i, alive in enumerate(verdicts.is_alive):
            c = int(best(utility[i], alive, 1).argmax())
            row = scores[place[i, c]]
            told = {name: _finite(value) for name, value in zip(self.judges.outcome.names, row, strict=True)}
            candidate, picture = draws[i * n + c], pixels[place[i, c]]
            how = (sampled[i], int(alive.sum()), evaluations[i], counts[i])
            kept.append(Kept(picture, float(utility[i, c]), told, candidate, *how))
        return kept

    def _check(
        self, step: SamplerStep, verdicts: Verdicts, asked: Sequence[str], counts: Sequence[Counter[str]]
    ) -> None:
        """Previews of one step to verdicts; the scorers are told the time at which the preview was taken."""
        time = float(self.model.schedule.network_time(torch.tensor(step.t, dtype=torch.float64)))
        seen = verdicts.to_clear() | verdicts.to_ask()
        if seen.any():
            assert self.decode is not None
            rows = torch.from_numpy(np.flatnonzero(seen)).to(step.pred_x0.device)
            previews = torch.cat([self.decode(part) for part in step.pred_x0[rows].split(self.sampling.batch_size)])
            of_row = np.full(seen.shape, -1)
            of_row[seen] = np.arange(seen.sum())

            def answers(judge: Any, where: NDArray[np.bool_], question: str) -> NDArray[np.float64]:
                of_picture = np.nonzero(where)[0].tolist()
                for i in of_picture:
                    counts[i][question] += 1
                pixels = previews[torch.from_numpy(of_row[where])]
                return judge.utility(judge.score_pixels(pixels, [asked[i] for i in of_picture], time))

            where = verdicts.to_clear()
            if where.any():
                verdicts.set_clarity(where, answers(self.judges.clarity, where, "clarity"))
            where = verdicts.to_ask()
            if where.any():
                verdicts.set_potential(where, answers(self.judges.potential, where, "potential"))
        verdicts.prune(self.check_at.index(step.index))

    def _judged(
        self, latents: Tensor, verdicts: Verdicts, asked: Sequence[str], counts: Sequence[Counter[str]]
    ) -> tuple[list[Pixels], NDArray[np.float32]]:
        """Pictures and scores [R, J] of the candidates that were sampled to the end."""
        rows = torch.from_numpy(np.flatnonzero(verdicts.is_alive)).to(latents.device)
        pixels: list[Pixels] = []
        for part in latents[rows].split(self.sampling.batch_size):
            pixels += list(decoded(self.model, part))
        of_picture = np.nonzero(verdicts.is_alive)[0].tolist()
        for i in of_picture:
            counts[i]["outcome"] += 1
        images = [Image.fromarray(array) for array in pixels]
        return pixels, self.judges.outcome.score(images, [asked[i] for i in of_picture])

    def _facts(self, kept: Kept, prompt: str) -> dict[str, Any]:
        """What the manifest says; with `candidate` as its number and its prompt, plain generation makes the picture."""
        per_step = 1 if self.sampling.cfg_scale == 1 else 2
        return {
            "candidate": kept.candidate,
            "candidates": self.settings.candidates,
            "finished": kept.finished,
            "score": _finite(kept.utility),
            "scores": kept.scores,
            "evaluations": kept.evaluations,
            "evaluations_best_of_n": self.settings.candidates * self.sampling.num_steps * per_step,
            "judged": dict(sorted(kept.judged.items())),
            **({"reflections": kept.reflections} if self.selection.hook else {}),
            **({"sampled_prompt": kept.prompt} if kept.prompt != prompt else {}),
        }


def _better(old: Kept, new: Kept) -> Kept:
    """The one that scores higher, the old one where they are equal, with what both took."""
    winner = new if new.utility > old.utility else old
    judged, took = old.judged + new.judged, old.evaluations + new.evaluations
    winner.reflections, winner.latest = old.reflections + 1, new.pixels
    winner.judged, winner.evaluations, winner.finished = judged, took, old.finished + new.finished
    return winner


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
