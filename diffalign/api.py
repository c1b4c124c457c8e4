"""The verbs as Python functions: keyword arguments only, the same configs and the same results as the command line.

    import diffalign
    run = diffalign.train(configs=["sdxl", "diffusion-dpo"], source={"data": {"path": "pairs.parquet"}})
    diffalign.evaluate(configs=["sdxl"], evaluate={"adapters": [str(run.folder / "export")], "prompts": "prompts.txt"})

`configs` lists names or paths of config files, merged from left to right; every further keyword is a section.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.config import Config, config_names, resolve
from diffalign.errors import UserError
from diffalign.registry import build
from diffalign.sections import TABS

if TYPE_CHECKING:
    from diffalign.browsing import Library, Query
    from diffalign.launching import Launcher
    from diffalign.launching._form import Field
    from diffalign.ranking import Standings
    from diffalign.recipes.evaluate import Evaluation
    from diffalign.recipes.painter import Painter
    from diffalign.recipes.painter._studio import Studio
    from diffalign.recipes.stages import StagesResult
    from diffalign.recipes.sweep import SweepResult
    from diffalign.recipes.train import TrainResult
    from diffalign.recipes.train_scorer import ScorerResult
    from diffalign.recipes.voting import Voting
    from diffalign.runs import Run, RunView
    from diffalign.runs._charts import Drawer
    from diffalign.votes import VoteBook

__all__ = [
    "TABS",
    "Config",
    "UserError",
    "browse_query",
    "build",
    "check",
    "command_line",
    "compare",
    "config_differences",
    "config_names",
    "configure",
    "data_library",
    "demo",
    "difference",
    "evaluate",
    "example_pairs",
    "export",
    "filter",
    "find_data_sets",
    "find_runs",
    "form_fields",
    "generate",
    "label",
    "launcher",
    "painter",
    "read_run",
    "run_charts",
    "score",
    "stages",
    "standings",
    "studio",
    "sweep",
    "train",
    "train_scorer",
    "view_run",
    "vote_book",
    "voting",
]

Section = Mapping[str, Any]


def configure(*, configs: Sequence[str | Section] = (), **sections: Section) -> Config:
    """The resolved config that the other verbs would use.

    Raises:
        UserError: an unknown file, section, key or name, or a wrong type.
    """
    return resolve([*configs, sections])


def generate(*, configs: Sequence[str | Section] = (), quiet: bool = False, **sections: Section) -> Path:
    """Makes images (section `generate`); returns their folder."""
    from diffalign.recipes.generate import generate as recipe

    return recipe(configure(configs=configs, **sections), quiet)


def score(*, configs: Sequence[str | Section] = (), quiet: bool = False, **sections: Section) -> Path:
    """Scores generated images (section `score`); returns the JSONL file of scores."""
    from diffalign.recipes.score import score as recipe

    return recipe(configure(configs=configs, **sections), quiet)


def filter(*, configs: Sequence[str | Section] = (), quiet: bool = False, **sections: Section) -> Path:
    """Leaves out the pairs of highest CHES (section `filter`); returns the folder of the records that stay."""
    from diffalign.recipes.filter import filter as recipe

    return recipe(configure(configs=configs, **sections), quiet)


def label(*, configs: Sequence[str | Section] = (), quiet: bool = False, **sections: Section) -> Path:
    """Makes preference records of scores (section `label`); returns their folder."""
    from diffalign.recipes.label import label as recipe

    return recipe(configure(configs=configs, **sections), quiet)


def agree(*, configs: Sequence[str | Section] = (), quiet: bool = False, **sections: Section) -> Path:
    """How often scorers agree with recorded human preferences (section `agree`); returns the file of results."""
    from diffalign.recipes.agree import agree as recipe

    return recipe(configure(configs=configs, **sections), quiet)


def train(
    *,
    configs: Sequence[str | Section] = (),
    callbacks: Sequence[Callable[[int, Mapping[str, float]], None]] = (),
    quiet: bool = False,
    **sections: Section,
) -> TrainResult:
    """Fine-tunes on preferences, or goes on where the same config stopped; each callback gets (step, metrics)."""
    from diffalign.recipes.train import train as recipe

    return recipe(configure(configs=configs, **sections), callbacks, quiet)


def train_scorer(*, configs: Sequence[str | Section] = (), quiet: bool = False, **sections: Section) -> ScorerResult:
    """Trains a CLIP-type scorer on preferences (section `train_scorer`), or goes on where the same config stopped."""
    from diffalign.recipes.train_scorer import train_scorer as recipe

    return recipe(configure(configs=configs, **sections), quiet)


def stages(
    *,
    configs: Sequence[str | Section] = (),
    callbacks: Sequence[Callable[[int, Mapping[str, float]], None]] = (),
    quiet: bool = False,
    **sections: Section,
) -> StagesResult:
    """Trains in stages (section `stages`): curriculum, reference refresh, momentum; goes on where the same config
    stopped."""
    from diffalign.recipes.stages import stages as recipe

    return recipe(configure(configs=configs, **sections), callbacks, quiet)


def evaluate(*, configs: Sequence[str | Section] = (), quiet: bool = False, **sections: Section) -> Evaluation:
    """Compares adapters with their base (section `evaluate`); writes the report."""
    from diffalign.recipes.evaluate import evaluate as recipe

    return recipe(configure(configs=configs, **sections), quiet)


def sweep(*, configs: Sequence[str | Section] = (), quiet: bool = False, **sections: Section) -> SweepResult:
    """Trains and judges several settings of one run (section `sweep`), and draws them; `failed` lists lost runs."""
    from diffalign.recipes.sweep import sweep as recipe

    return recipe(configure(configs=configs, **sections), quiet)


def compare(
    *,
    scores: Mapping[str, Mapping[str, Any]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    baseline: str,
    **options: Any,
) -> Any:
    """Win rates and means with paired intervals from arrays of scores; see `diffalign.evaluation.compare`."""
    from diffalign.evaluation import compare as statistics

    return statistics(scores, prompts, seeds, baseline, **options)


def painter(*, device: str = "auto") -> Painter:
    """The process's `Painter`: pictures while somebody waits, of models that stay loaded."""
    from diffalign.recipes.painter import shared

    return shared(device)


def studio(*, config: Config, folder: Path, roots: Sequence[Path], below: Callable[[str], Path]) -> Studio:
    """Models and adapters to compare, and comparisons of them; see `diffalign.recipes.painter._studio.Studio`."""
    from diffalign.recipes.painter._studio import Studio

    return Studio(config, folder, roots, below)


def difference(first: Any, second: Any) -> tuple[Any, float, int]:
    """(|first - second| amplified, its mean in grey levels, the gain) of two PIL images."""
    from diffalign.recipes.painter._comparison import difference as of

    return of(first, second)


def export(*, configs: Sequence[str | Section] = (), **sections: Section) -> Path:
    """Writes a run's weights in another format (section `export`); returns the folder."""
    from diffalign.recipes.export import export as recipe

    return recipe(configure(configs=configs, **sections))


def check(*, configs: Sequence[str | Section] = (), **sections: Section) -> dict[str, Any]:
    """A dry run on the family's tiny twin, with estimates of memory, disk and time of the real run."""
    from diffalign.recipes.check import check as recipe

    return recipe(configure(configs=configs, **sections))


def demo(
    *, model: str = "sprites-sdxl", out: str | None = None, quiet: bool = False, **sections: Section
) -> Evaluation:
    """The whole loop on an embedded model; returns its evaluation."""
    from diffalign.recipes.demo import demo as recipe

    config = configure(configs=[model, "diffusion-dpo", "demo", f"demo-{model}"], **sections)
    return recipe(replace(config, title=f"demo-{model}"), Path(out or f"runs/demo-{model}"), quiet)


def find_runs(*, roots: Sequence[Path]) -> list[Run]:
    """The training runs below folders, the newest first, and how each stands."""
    from diffalign.runs import find_runs as find

    return find(roots)


def read_run(*, folder: Path) -> Run | None:
    """How the run in `folder` stands now; None where it holds no run."""
    from diffalign.runs import is_run
    from diffalign.runs import read_run as read

    return read(folder) if is_run(folder) else None


def view_run(*, folder: Path) -> RunView:
    """A run to look at while it grows: curves, sample grids, config and events."""
    from diffalign.runs import RunView as View

    return View(folder)


def config_differences(*, first: Path, second: Path) -> list[tuple[str, Any, Any]]:
    """(key, of the first, of the second) of every key in which two runs' resolved configs differ."""
    from diffalign.runs import config_differences as differences

    return differences(first, second)


def run_charts() -> Drawer:
    """Draws the curves of one or two runs as SVG."""
    from diffalign.runs._charts import Drawer as Charts

    return Charts()


def form_fields(*, configs: Sequence[str]) -> list[Field]:
    """The keys of the training that these configs describe, as the fields of a form."""
    from diffalign.launching._form import form_fields as fields

    return fields(configs)


def launcher(*, folder: Path, roots: Sequence[Path], max_runs: int = 1, configs: Sequence[str] = ()) -> Launcher:
    """Starts, stops and resumes trainings as processes; see `diffalign.launching.Launcher`."""
    from diffalign.launching import Launcher as Starts

    return Starts(folder, roots, max_runs, configs)


def command_line(*, words: Sequence[str], verb: str = "train") -> str:
    """`diffalign VERB WORDS`, ready to be pasted into a shell."""
    from diffalign.launching import command

    return command(words, verb)


def example_pairs(*, path: Path, num: int = 160) -> Path:
    """Preference pairs drawn in the sprites world, made where the file is not there yet."""
    from diffalign.sprites.preferences import rendered_pairs, write_pairs

    if not path.is_file():
        write_pairs(path, rendered_pairs(num, seed=0))
    return path


def voting(path: Path, *, aspects: Sequence[str] = ()) -> Voting:
    """The votes in a file, made where there is none, and what is voted on; see `diffalign.recipes.voting.Voting`."""
    from diffalign.recipes.voting import Voting as Open

    return Open(path, aspects)


def vote_book(path: Path) -> VoteBook:
    """The votes in a file, made where there is none."""
    from diffalign.votes import VoteBook as Book

    return Book(path)


def standings(votes: Iterable[Any], **options: Any) -> Standings:
    """Bradley-Terry strengths of `VoteBook.votes` with intervals, and how far the voters agree; see
    `diffalign.ranking`."""
    from diffalign import ranking

    return ranking.standings(ranking.outcomes_of(votes), **options)


def find_data_sets(roots: Sequence[Path]) -> list[Path]:
    """What looks like preference data below folders."""
    from diffalign.browsing._files import find_data_sets as find

    return find(roots)


def data_library(*, folder: Path, below: Callable[[str | Path], Path]) -> Library:
    """Opens preference data sets to look through and correct; see `diffalign.browsing`."""
    from diffalign.browsing import Library as Open

    return Open(folder, below)


def browse_query(**fields: Any) -> Query:
    """Which records of a data set to look at, in which order; see `diffalign.browsing.Query`."""
    from diffalign.browsing import Query as Asked

    return Asked(**fields)
