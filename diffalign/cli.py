"""The command line: `diffalign VERB [config ...] [key=value ...]`.

Exit codes: 0 done, 1 the run failed, 2 the user's input was wrong (one line on stderr; --debug shows the traceback).
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign import __version__
from diffalign.errors import UserError, WaitsForVotes

if TYPE_CHECKING:
    from diffalign.evaluation import Comparison

VERBS = {
    "generate": "prompts to images",
    "score": "images to scores",
    "label": "scores to preference records",
    "agree": "how often scorers agree with people's recorded preferences, by a named rule",
    "filter": "drop the pairs whose training would displace their own winners (CHES)",
    "train": "fine-tune on preferences; the same command resumes",
    "train-scorer": "train a CLIP-type scorer on preferences, on pictures or on noisy previews; resumes",
    "stages": "train in stages: curriculum, reference refresh, momentum; the same command resumes",
    "evaluate": "base and adapters on the same prompts and seeds: win rates, grid, report",
    "sweep": "several settings of one run, trained and judged alike: Pareto front or curve; the same command resumes",
    "export": "a run's weights as diffusers LoRA or pipeline, or with webui keys",
    "check": "dry run on a tiny twin; estimates memory, disk and time of the real one",
    "demo": "the whole loop on an embedded model (sprites-sdxl or sprites-sd3)",
    "app": "compare, vote, browse, watch and train in the browser",
    "convert-beta": "one beta in the conventions of papers and code bases",
    "list": "methods, models, scorers or data",
    "doctor": "what this machine has",
}

EPILOG = """examples:
  diffalign demo sprites-sdxl
  diffalign train sdxl diffusion-dpo model.path=FOLDER source.data.path=pairs.parquet train.steps=2000
  diffalign check sdxl diffusion-dpo model.path=FOLDER source.data.path=pairs.parquet
  diffalign score IMAGES --prompts prompts.txt scorers=[clip_score,aesthetic]
  diffalign evaluate sdxl model.path=FOLDER evaluate.adapters=[runs/sdxl-diffusion-dpo/export] evaluate.prompts=p.txt
  diffalign sweep sprites-sdxl diffusion-dpo source.data.path=pairs sweep.key=objective.beta sweep.values=[500,2000]
    evaluate.prompts=sprites:heldout:100 evaluate.scorers=[sprites_gold,sprites_sparse]
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffalign",
        description="Preference alignment of text-to-image diffusion models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"diffalign {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if verb == "list":
            sub.add_argument("kind", choices=("methods", "models", "scorers", "data", "objectives"))
        elif verb == "convert-beta":
            sub.add_argument("value", type=float)
            sub.add_argument("convention", nargs="?", default="diffalign", help="whose beta it is")
            sub.add_argument("--latent", type=int, nargs="+", default=(4, 64, 64), help="C H W (default 4 64 64)")
        elif verb != "doctor":
            sub.add_argument("--quiet", action="store_true", help="no progress")
            if verb == "score":
                sub.add_argument("--prompts", metavar="FILE", help="score.prompts, of pictures without a manifest")
            sub.add_argument(
                "config", nargs="*", help="config names or paths, merged from left to right, then key=value"
            )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    parser = _parser()
    # words that follow an option are left over: argparse fills a `*` argument only once
    arguments, words = parser.parse_known_args(argv)
    if words and (not hasattr(arguments, "config") or any(word.startswith("-") for word in words)):
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    if words:
        arguments.config += words
    try:
        _run(arguments)
    except UserError as error:
        if arguments.debug:
            raise
        print(f"diffalign {arguments.verb}: {error}", file=sys.stderr)
        return 2
    except WaitsForVotes as wait:
        print(f"diffalign {arguments.verb}: {wait}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"diffalign {arguments.verb}: interrupted; the same command resumes", file=sys.stderr)
        return 1
    except (FloatingPointError, RuntimeError, OSError, MemoryError) as error:
        if arguments.debug:
            raise
        print(f"diffalign {arguments.verb}: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        return 1
    return 0


def _run(arguments: argparse.Namespace) -> None:
    verb = arguments.verb
    if verb == "list":
        _list(arguments.kind)
        return
    if verb == "doctor":
        from diffalign.recipes.doctor import doctor

        print("\n".join(doctor()))
        return
    if verb == "convert-beta":
        from diffalign.beta import beta_table

        print("\n".join(beta_table(arguments.value, arguments.convention, arguments.latent)))
        return
    from diffalign import api
    from diffalign.config import resolve

    tokens: list[str] = _score_words(arguments) if verb == "score" else arguments.config
    if verb == "demo":
        models = [token for token in tokens if "=" not in token] or ["sprites-sdxl"]
        overrides: dict[str, Any] = resolve_overrides([token for token in tokens if "=" in token])
        show_evaluation(api.demo(model=models[0], quiet=arguments.quiet, **overrides))
        return
    if verb == "app":
        serve(tokens, arguments.quiet)
        return
    if not tokens:
        raise UserError(
            "name a config, such as sdxl or a path, or give key=value; `diffalign list methods` shows names"
        )
    if verb == "check":
        from diffalign.recipes.check import check

        print(check(resolve(tokens))["text"])
        return
    options = {} if verb == "export" else {"quiet": arguments.quiet}
    result = getattr(api, verb.replace("-", "_"))(configs=tokens, **options)
    from diffalign.distributed import is_main_process

    if is_main_process():
        _show(verb, result)


def _score_words(arguments: argparse.Namespace) -> list[str]:
    """`score IMAGES --prompts FILE scorers=[...]` in the words of all verbs: score.images=IMAGES and so on."""
    from dataclasses import fields

    from diffalign.config import config_names
    from diffalign.sections import Score

    keys = {field.name for field in fields(Score)}
    known = [name for kind in ("models", "methods", "runs") for name in config_names(kind)]
    words: list[str] = []
    for word in arguments.config:
        if word.partition("=")[0] in keys and "=" in word:
            words.append(f"score.{word}")
        elif "=" in word or Path(word).suffix in (".yaml", ".yml") or (word in known and not Path(word).exists()):
            words.append(word)
        else:
            words.append(f"score.images={word}")
    return words + ([f"score.prompts={arguments.prompts}"] if arguments.prompts else [])


def serve(tokens: Sequence[str], quiet: bool) -> None:
    """The app, until it is interrupted.

    Raises:
        UserError: gradio is not installed, or a setting does not fit.
    """
    try:
        import gradio_app
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "gradio_app"):
            raise
        raise UserError("the app needs gradio: pip install 'diffalign[ui]'") from error
    gradio_app.serve(tokens, quiet)


def resolve_overrides(tokens: Sequence[str]) -> dict[str, Any]:
    """key=value tokens as nested sections."""
    from diffalign.config import merge_overrides

    return merge_overrides(tokens)


def _show(verb: str, result: Any) -> None:
    if verb == "train":
        print(f"trained {result.steps} steps; weights in {result.folder / 'export'}")
        if "ended_early" in result.check:
            print(f"ended early: {result.check['ended_early']}")
        if "exported_step" in result.check:
            print(f"exported the best measured weights, after step {result.check['exported_step']}")
        if result.check.get("image_mean_difference") is not None:
            covered = " and ".join(
                f"{result.check[f'{name}_covered']} of {result.check[name]} {what}"
                for name, what in (("num_targets", "targets"), ("num_user_layers", "user attentions"))
                if name in result.check
            )
            difference = result.check["image_mean_difference"]
            print(f"self-check: export covers {covered}, a fixed-seed picture changed by {difference:.2f} of 255")
    elif verb == "train-scorer":
        found = {name: value for name, value in result.holdout.items() if value is not None}
        of_base = {name: f" (base {value:.3f})" for name, value in result.base.items()}
        values = ", ".join(f"{name} {value:.3f}{of_base.get(name, '')}" for name, value in found.items())
        print(f"trained {result.steps} steps; scorer in {result.folder / 'export'}{values and '; held out: '}{values}")
    elif verb == "stages":
        print(f"trained {len(result.rows)} stages; weights in {result.export}, summary in {result.folder}/stages.json")
    elif verb == "filter":
        facts = json.loads((result / "filter.json").read_text())
        print(f"{result}: kept {facts['kept']} of {facts['pairs']} pairs; what left is listed in filter.json")
    elif verb == "label":
        from diffalign.recipes.label import summary

        print("\n".join(summary(result)))
    elif verb == "agree":
        from diffalign.recipes.agree import summary as agreement

        print("\n".join(agreement(result)))
    elif verb == "evaluate":
        show_evaluation(result)
    elif verb == "sweep":
        _show_sweep(result)
    else:
        print(result)


def show_evaluation(result: Any) -> None:
    """The headline of an evaluation, as lines."""
    comparison: Comparison = result.comparison
    for row in comparison.rows:
        if row.category is None:
            line = f"{row.model}: {row.scorer} {row.mean.mean:.4f} +- {row.mean.se:.4f}"
            if row.win is not None:
                line += f", wins {100 * row.win.rate:.1f} % [{100 * row.win.low:.1f}, {100 * row.win.high:.1f}]"
                line += f" against {comparison.baseline}: {row.verdict}"
            print(line)
    print(result.summary)
    print(f"{comparison.num_prompts} prompts x {comparison.num_seeds} seeds; report: {result.report}")


def _show_sweep(result: Any) -> None:
    """Every setting's means as a line.

    Raises:
        RuntimeError: some runs failed, so the command did.
    """
    front = result.results.get("front", ())
    for row in result.results["settings"]:
        means = ", ".join(
            f"{name} {of['mean']['mean']:.4f} +- {of['mean']['se'] or 0:.4f}" for name, of in row["scorers"].items()
        )
        print(f"{row['name']}: {means}{' (front)' if row['name'] in front else ''}")
    print(f"report: {result.report}")
    if result.failed:
        names = "; ".join(f"{run['name']} (seed {run['seed']})" for run in result.failed)
        raise RuntimeError(f"{len(result.failed)} runs failed and are left out: {names}; the same command tries again")


def _list(kind: str) -> None:
    from diffalign.config import config_folder, config_names
    from diffalign.registry import PACKAGES, names

    if kind in ("methods", "models"):
        for name in config_names(kind):
            print(f"{name:20s} {_first_comment(config_folder() / kind / f'{name}.yaml')}")
        return
    registry_kind = {"scorers": "scorer", "data": "data", "objectives": "objective"}[kind]
    folder = Path(__file__).parent / PACKAGES[registry_kind].rpartition(".")[2]
    for name in names(registry_kind):
        docstring = ast.get_docstring(ast.parse((folder / f"{name}.py").read_text())) or ""
        print(f"{name:20s} {docstring.splitlines()[0] if docstring else ''}")


def _first_comment(path: Path) -> str:
    first = path.read_text().split("\n", 1)[0]
    return first.lstrip("# ") if first.startswith("#") else ""
