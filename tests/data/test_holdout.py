"""The hold-out split: by prompt, deterministic, independent of the other rows, of the right size."""

from __future__ import annotations

import numpy as np
import pytest

from diffalign.data import build_cache, split_holdout
from diffalign.types import UserError


class Keys:
    """As much of a cache as the split looks at."""

    def __init__(self, keys):
        self.prompt_keys = np.array(keys)

    def __len__(self):
        return len(self.prompt_keys)


def test_no_prompt_is_on_both_sides_and_the_share_is_right():
    keys = np.random.default_rng(0).integers(0, 2**62, 4000).repeat(3)
    data = Keys(keys)
    train, held = split_holdout(data, 0.1, seed=1)
    assert sorted([*train, *held]) == list(range(12000))
    assert not set(keys[train]) & set(keys[held])
    assert abs(len(held) / 12000 - 0.1) < 3 * (0.1 * 0.9 / 4000) ** 0.5
    again = split_holdout(data, 0.1, seed=1)
    assert np.array_equal(again[1], held) and not np.array_equal(split_holdout(data, 0.1, seed=2)[1], held)
    part = Keys(keys[:600])  # a prompt's side does not depend on the other rows
    assert np.array_equal(split_holdout(part, 0.1, seed=1)[1], held[held < 600])
    assert set(held) < set(split_holdout(data, 0.2, seed=1)[1])  # a larger hold-out contains the smaller


def test_reader_and_cache_agree_and_spelling_does_not_matter(kit, tmp_path):
    prompts = [text for i in range(12) for text in (f"a cat {i}", f"A  Cat {i} ")]
    reader = kit.ListReader([kit.record(i, prompt) for i, prompt in enumerate(prompts)])
    cache = build_cache(reader, kit.Encoder(), tmp_path, resolution=32, progress=False)
    by_reader, by_cache = split_holdout(reader, 0.4, 3), split_holdout(cache, 0.4, 3)
    assert np.array_equal(by_reader[0], by_cache[0]) and np.array_equal(by_reader[1], by_cache[1])
    assert 0 < len(by_cache[1]) < 24
    assert {i // 2 for i in by_cache[0]}.isdisjoint({i // 2 for i in by_cache[1]})


def test_bad_fractions():
    train, held = split_holdout(Keys([1, 2]), 0.0)
    assert len(train) == 2 and len(held) == 0
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="holdout fraction"):
            split_holdout(Keys([1]), fraction)
    with pytest.raises(UserError, match="only 1 distinct prompts"):
        split_holdout(Keys([5, 5]), 0.999999)
