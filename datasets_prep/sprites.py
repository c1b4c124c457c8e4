"""Preference pairs of the sprites world: a picture that shows the caption against one that is wrong in one thing.

    python datasets_prep/sprites.py out/ --num 2000 --noise 0.1

Every pair is a pure function of its number and the seed, the winner is as often first as second, and `--noise` turns
the label of that share of the pairs around (`meta.is_flipped` says which).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np

from diffalign.data import RecordWriter
from diffalign.data._progress import track
from diffalign.randomness import address
from diffalign.sprites.render import render
from diffalign.sprites.scene import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    KINDS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    caption,
    parse,
    prompts,
)
from diffalign.types import Record, UserError


def _other(rng: np.random.Generator, options: Iterable[str], *taken: str | None) -> str:
    rest = [option for option in options if option not in taken]
    return rest[int(rng.integers(len(rest)))]


def _changes(scene: Scene) -> list[str]:
    """What the caption says and may therefore be wrong."""
    first = scene.sprites[0]
    named = {"shape": True, "colour": first.colour, "size": first.size, "background": scene.background}
    named.update(relation=scene.relation, count=scene.count > 1)
    return [what for what, is_said in named.items() if is_said]


def wrong_scene(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one thing changed that its caption names, so that no picture of it shows the caption."""
    changes = _changes(scene)
    what = changes[int(rng.integers(len(changes)))]
    if what == "background":
        return replace(scene, background=_other(rng, BACKGROUNDS, scene.background))
    if what == "relation":
        return replace(scene, relation=_other(rng, RELATIONS, scene.relation))
    if what == "count":
        return replace(scene, count=_other_count(rng, scene.count))
    place = int(rng.integers(len(scene.sprites)))
    sprite = scene.sprites[place]
    options = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}[what]
    # Two sprites are told apart by colour, so neither may take the other's.
    taken = [other.colour for other in scene.sprites] if what == "colour" else [getattr(sprite, what)]
    changed = replace(sprite, **{what: _other(rng, options, *taken)})
    return replace(scene, sprites=tuple(changed if i == place else s for i, s in enumerate(scene.sprites)))


def _other_count(rng: np.random.Generator, count: int) -> int:
    return int(_other(rng, [str(number) for number in COUNTS.values()], str(count)))


def _png(scene: Scene, rng: np.random.Generator) -> bytes:
    buffer = BytesIO()
    render(scene, rng).save(buffer, "PNG")
    return buffer.getvalue()


def pair(prompt: str, number: int, seed: int, noise: float) -> Record:
    """Pair `number` for a caption."""
    rng = np.random.default_rng([seed, number])
    scene = parse(prompt)
    wrong = wrong_scene(scene, rng)
    images = [_png(scene, rng), _png(wrong, rng)]
    utility = [1.0, 0.0]
    if rng.random() < 0.5:
        images.reverse()
        utility.reverse()
    is_flipped = bool(rng.random() < noise)
    if is_flipped:
        utility.reverse()
    return Record(
        id=address("sprites", seed, number),  # a reader takes its own, from the content
        prompt=prompt,
        images=tuple(images),
        utility=tuple(utility),
        meta={"loser": caption(wrong), "is_flipped": is_flipped},
    )


def convert(args: argparse.Namespace) -> int:
    """Writes the pairs; returns how many there are.

    Raises:
        UserError: settings out of range, or an output folder written with other ones.
    """
    if not 0 <= args.noise <= 1 or args.num < 1:
        raise UserError("--noise must be in [0, 1] and --num at least 1")
    settings = {key: str(value) for key, value in sorted(vars(args).items()) if key != "out"}
    texts = prompts(args.num, args.seed, args.split, args.kind)
    with RecordWriter(args.out, resume=True, shard_records=args.shard_records) as writer:
        state = writer.state or {"next": 0, "settings": settings}
        if state["settings"] != settings:
            raise UserError(f"{args.out}: written with other settings; give an empty folder")
        rows = range(state["next"], args.num)
        for number in track(rows, len(rows), "drawing"):
            record = pair(texts[number], number, args.seed, args.noise)
            writer.write(record, {"next": number + 1, "settings": settings})
        return writer.num_written


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("out", type=Path, help="folder for records-*.parquet")
    result.add_argument("--num", type=int, default=1000, help="pairs (default: 1000)")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--noise", type=float, default=0.0, help="share of pairs with the label turned around")
    result.add_argument("--split", choices=("train", "heldout"), default="train", help="of the captions")
    result.add_argument("--kind", choices=KINDS, help="one kind of caption (default: the mixture)")
    result.add_argument("--shard-records", type=int, default=1000, metavar="N", help="pairs per file (default: 1000)")
    return result


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on stderr where the input was wrong."""
    args = parser().parse_args(argv)
    try:
        print(f"{convert(args)} pairs in {args.out}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
