"""Before a picture is made: variants to configs, prompts one at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from diffalign.config import resolve
from diffalign.data import read_prompts
from diffalign.recipes import generate as recipe
from diffalign.recipes.generate import _manifest
from diffalign.recipes.generate._prompts import FilePrompts, open_prompts
from diffalign.recipes.generate._variants import variants
from diffalign.sections import Generate
from diffalign.types import UserError


def test_a_variant_with_a_model_of_its_own_keeps_nothing_of_the_commands_model():
    varied = variants(resolve(["sprites-sdxl", "generate.vary=[{}, {model: sd15}, {model: {resolution: 32}}]"]))
    assert [part.name for part in varied] == ["base", "sd15", "model"]
    assert varied[1].config.model.resolution is None and varied[1].config.names["model"] == "sd15"
    assert varied[2].config.model.resolution == 32 and varied[2].config.names["model"] == "sdxl"
    assert variants(resolve(["generate.vary=[{model: sprites-sd3}]"]))[0].config.names["model"] == "sd3"
    with pytest.raises(UserError, match="no model configured"):
        variants(resolve(["generate.vary=[{}]"]))


# Prompts


def test_prompts_are_read_from_the_file_on_every_pass_and_not_held(tmp_path, monkeypatch):
    text, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("a cat\n\n  a dog \n")
    rows.write_text('{"prompt": "a cat"}\n\n{"caption": "a dog"}\n')
    for path in (text, rows):
        found = open_prompts(str(path), "k")
        assert isinstance(found, FilePrompts)
        assert len(found) == 2 and list(found) == list(found) == read_prompts(str(path), "k")
    assert open_prompts("sprites:heldout:5:two", "k") == read_prompts("sprites:heldout:5:two", "k")
    for content_, match in ((b"", "holds no prompts"), (b"\xff\xfe\xfa", "UTF-8"), (b'{"text": 1}\n', "line 1")):
        rows.write_bytes(content_)
        with pytest.raises(UserError, match=match):
            open_prompts(str(rows), "k")
    with pytest.raises(UserError, match="no such file"):
        open_prompts("nowhere.txt", "k")


class Endless:
    """More prompts than could be held."""

    def __len__(self) -> int:
        return 10**12

    def __iter__(self) -> Iterator[str]:
        return (f"thing {number}" for number in itertools.count())


def test_batches_and_rows_take_prompts_as_they_need_them(tmp_path):
    first, second = itertools.islice(recipe._batches(Endless(), 2, 3), 2)
    assert first == [(0, "thing 0", 0), (0, "thing 0", 1), (1, "thing 1", 0)] and second[0] == (1, "thing 1", 1)
    rows = itertools.islice(_manifest._rows(tmp_path, Endless(), Generate(), {"": {}}), 5)
    assert [(row["prompt_id"], row["number"]) for row in rows] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
