"""The sprites world: captions and their parser, the judge on right and deliberately wrong pictures, proxy, users."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from diffalign.sprites.judge import judge
from diffalign.sprites.proxy import colourfulness, proxy
from diffalign.sprites.render import render
from diffalign.sprites.scene import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    caption,
    is_held_out,
    parse,
    prompts,
    sample_scene,
)
from diffalign.sprites.users import User, sample_user

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def scenes(kind: str, num: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    return [sample_scene(rng, kind) for _ in range(num)]


@pytest.mark.parametrize("kind", KINDS)
def test_captions_parse_back(kind):
    for scene in scenes(kind, 300):
        assert parse(caption(scene)) == scene
        assert scene.kind == kind
        assert len(caption(scene).split()) <= 14


@pytest.mark.parametrize(
    "text", ["", "a", "a red", "a red circle square", "two red circle", "a red circle above a red square", "ein Kreis"]
)
def test_other_text_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match="not a sprites caption") as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_splits_are_disjoint_and_stable():
    train, held_out = prompts(200, split="train"), prompts(200, split="heldout")
    assert not set(train) & set(held_out)
    assert train == prompts(200, split="train") and train != prompts(200, seed=1, split="train")
    assert train[:50] == prompts(50, split="train")
    assert all(is_held_out(text) for text in held_out)


def share_correct(kind: str, num: int = 120, distort=None) -> float:
    rng, right = np.random.default_rng(3), 0
    for scene in scenes(kind, num):
        pixels = np.asarray(render(scene, rng))
        pixels = distort(pixels, rng) if distort else pixels
        right += judge(pixels, caption(scene)).correct
    return right / num


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_is_right_on_rendered_scenes(kind):
    assert share_correct(kind) >= 0.995


def blur(pixels, rng):
    return ndimage.gaussian_filter(pixels.astype(np.float32), (0.7, 0.7, 0)).astype(np.uint8)


def noise(pixels, rng):
    return (pixels + rng.normal(size=pixels.shape) * 8).clip(0, 255).astype(np.uint8)


def tint(pixels, rng):
    return (pixels * rng.uniform(0.92, 1.0, size=3)).astype(np.uint8)


def soften(pixels, rng):
    """What a small VAE does: half the resolution, colours off, a haze."""
    small = ndimage.zoom(pixels.astype(np.float32), (0.5, 0.5, 1), order=1)
    haze = ndimage.gaussian_filter(rng.normal(size=pixels.shape), (2, 2, 0)) * 40
    return (ndimage.zoom(small, (2, 2, 1), order=1) + rng.normal(size=3) * 8 + haze).clip(0, 255).astype(np.uint8)


def specks(pixels, rng):
    """A few stray dots of up to 3 x 3 pixels."""
    spotted = pixels.copy()
    for y, x in rng.integers(0, 61, size=(4, 2)):
        spotted[y : y + 3, x : x + 3] = 128
    return spotted


@pytest.mark.parametrize("distort", [blur, noise, tint, soften, specks])
@pytest.mark.parametrize("kind", ["single", "two"])
def test_the_judge_bears_what_generated_pictures_have(kind, distort):
    assert share_correct(kind, 60, distort) >= 0.95


def other(options, value, rng):
    return str(rng.choice([option for option in options if option != value]))


@pytest.mark.parametrize("attribute", ["shape", "colour", "size", "background", "count"])
def test_one_wrong_attribute_of_a_single_scene_is_the_one_found(attribute):
    rng, num, caught = np.random.default_rng(4), 100, 0
    for scene in scenes("single", num, seed=1):
        sprite = scene.sprites[0]
        if attribute == "background":
            wrong = replace(scene, background=other(BACKGROUNDS, scene.background, rng))
        elif attribute == "count":
            wrong = replace(scene, count=2)
        else:
            options = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}[attribute]
            changed = replace(sprite, **{attribute: other(options, getattr(sprite, attribute), rng)})
            wrong = replace(scene, sprites=(changed,))
        verdict = judge(render(wrong, rng), caption(scene))
        caught += [name for name, right in verdict.attributes.items() if not right] == [attribute]
    assert caught / num >= 0.99


@pytest.mark.parametrize("attribute", ["shape", "size", "colour"])
def test_one_wrong_attribute_of_two_sprites_is_found(attribute):
    rng, num, caught = np.random.default_rng(5), 100, 0
    for scene in scenes("two", num, seed=1):
        first, second = scene.sprites
        options = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}[attribute]
        left = [option for option in options if option not in (getattr(first, attribute), getattr(second, attribute))]
        value = str(rng.choice(left or [o for o in options if o != getattr(second, attribute)]))
        wrong = replace(scene, sprites=(first, replace(second, **{attribute: value})))
        verdict = judge(render(wrong, rng), caption(scene))
        caught += [name for name, right in verdict.attributes.items() if not right] == [f"second {attribute}"]
    assert caught / num >= 0.99


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_wrong_side_is_found(relation):
    rng = np.random.default_rng(6)
    for scene in scenes("two", 25, seed=2):
        scene = replace(scene, relation=relation)
        wrong = replace(scene, relation=OPPOSITE[relation])
        verdict = judge(render(wrong, rng), caption(scene))
        assert [name for name, right in verdict.attributes.items() if not right] == ["position"]
        assert judge(render(scene, rng), caption(scene)).correct


def test_an_empty_picture_shows_nothing_but_its_ground():
    empty = np.full((64, 64, 3), BACKGROUNDS["dark"], np.uint8)
    verdict = judge(empty, "a small red circle on a dark background")
    assert [name for name, right in verdict.attributes.items() if right] == ["background"]
    assert verdict.score == 0.2 and not verdict.correct


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match="64 x 64"):
        judge(np.zeros((32, 32, 3), np.uint8), "a red circle")


def test_the_proxy_agrees_with_gold_and_can_be_hacked():
    rng = np.random.default_rng(7)
    text = "a small red circle on a dark background"
    right = render(parse(text), rng)
    wrong = render(parse("a small blue square on a dark background"), rng)
    assert proxy(right, text) > proxy(wrong, text)
    flood = np.full((64, 64, 3), COLOURS["red"], np.uint8)
    assert judge(flood, text).score < judge(wrong, text).score  # worse in truth
    assert proxy(flood, text) > proxy(wrong, text)  # and yet preferred: the bias
    assert colourfulness(flood) > 0.6 > colourfulness(right)


def test_the_proxy_follows_gold_where_pictures_are_like_the_data():
    rng = np.random.default_rng(9)
    asked = scenes("single", 150, seed=3)
    shown = [scene if index % 2 else sample_scene(rng, "single") for index, scene in enumerate(asked)]
    pairs = [(render(scene, rng), caption(text)) for scene, text in zip(shown, asked, strict=True)]
    gold = [judge(*pair).score for pair in pairs]
    assert np.corrcoef(gold, [proxy(*pair) for pair in pairs])[0, 1] > 0.8


def test_tastes_decide_and_flips_reverse():
    rng = np.random.default_rng(8)
    red = render(parse("a large red circle on a dark background"), rng)
    blue = render(parse("a large blue circle on a dark background"), rng)
    text = "a large circle on a dark background"
    likes_red = User({"red": 1.0, "blue": -1.0}, temperature=0)
    assert likes_red.prefers_first(red, blue, text, rng)
    assert not User({"red": -1.0, "blue": 1.0}, temperature=0).prefers_first(red, blue, text, rng)
    assert not replace(likes_red, flip_rate=1.0).prefers_first(red, blue, text, rng)
    votes = [replace(likes_red, flip_rate=0.3).prefers_first(red, blue, text, rng) for _ in range(300)]
    assert 0.6 < np.mean(votes) < 0.8
    assert set(sample_user(rng).taste) >= set(COLOURS)
    with pytest.raises(ValueError, match="pink"):
        User({"pink": 1.0})
