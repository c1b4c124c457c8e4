"""The rows of on_policy_on_sprites.py: which shipped config, and what the small world changes in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from methods_data import GOLD

STEPS = 20  # of the sampler, in training
BETA, NOISE = "beta of the model", "noise of the model"  # in a method's sections, for a value of OF_MODEL
# beta of likelihoods over noise levels is the demos': velocity errors exceed noise errors. The noise of steps is that
# of ancestral sampling: DDIM's eta 1, the flow SDE's sqrt 2
OF_MODEL = {"sprites-sdxl": {BETA: 1000.0, NOISE: 1.0}, "sprites-sd3": {BETA: 100.0, NOISE: 2**0.5}}


@dataclass(frozen=True)
class Method:
    """A shipped config, and what the small world changes in it."""

    config: str
    images: int  # of a round, in pictures of STEPS steps; 0 where nothing is sampled while training
    steps: int  # optimizer steps of a round
    sections: dict[str, Any]
    records: Literal["base's", "rendered"] | None = None  # pictures it learns from besides its own


def _pool(every: int, strategy: str = "last", size: int = 2) -> dict[str, Any]:
    return {"name": "checkpoint_pool", "strategy": strategy, "every": every, "size": size}


def _dpo(whose: str) -> Method:
    source = {"images_per_prompt": 4, "prompts_per_round": 16, "pairs": "all", "sample_from": whose}
    sections = {"source": source, "reference": {"name": "adapter_off"}, "objective": {"beta": BETA}}
    return Method("online-dpo", 64, 16, {**sections, "train": {"batch_size": 16}})


def _rivals(config: str, records: Literal["base's", "rendered"] = "base's", **sections: Any) -> Method:
    source = {"steps_per_round": 16}
    return Method(config, 64, 16, {"source": source, "train": {"batch_size": 8}, **sections}, records)


def _seppo(config: str, records: Literal["base's", "rendered"] = "base's", **sections: Any) -> Method:
    return _rivals(config, records, **{"reference": _pool(16), "objective": {"beta": BETA}, **sections})


def _offline(config: str, records: Literal["base's", "rendered"], batch_size: int, **sections: Any) -> Method:
    return Method(config, 0, 16, {"train": {"batch_size": batch_size}, **sections}, records)


def _normalized(config: str, steps: int, source: dict[str, Any], batch_size: int) -> Method:
    """The ratios are smaller by the steps' stds, so beta is larger."""
    sections = {"source": source, "likelihood": {"ratio": "normalized"}, "objective": {"beta": 10.0}}
    return Method(config, 64, steps, {**sections, "train": {"batch_size": batch_size}})


def _rso(reject: float) -> Method:
    source = {"images_per_prompt": 8, "prompts_per_round": 8, "reject": reject}
    return Method("rso", 64, 16, {"source": source, "objective": {"beta": BETA}, "train": {"batch_size": 16}})


EXPLORE = {"name": "explore", "beta": BETA, "weight": 0.01, "candidates": [1]}
SOFT_PAIR = {"name": "pair", "beta": BETA, "labels": "soft", "temperature": 0.1}
KL_ON_RIVALS = {"name": "kl", "weight": 100.0, "candidates": [2]}
# Steps that are recorded or branch: the noisier. A log-density counts in units of its step's own noise, so that the
# last, nearly noiseless steps outweigh the rest: `d3po-every-step` shows it.
EARLY = {"noisy": [0.0, 0.6]}
LAST = 11
D3PO = {"images_per_prompt": 4, "prompts_per_round": 16, "pairs": "all"}
SPO = {"prompts_per_round": 20, "scorers": ["sprites_clip"]}
GOLD_ON_PREVIEWS = {"prompts_per_round": 20, "temperature": 0.1}
GROUPS = {"images_per_prompt": 8, "prompts_per_round": 8}
# GRPO-Guard's ratios in other methods: every step counts alike, so that none has to be left out
MEANS = {"record_means": True, "sampling": {"eta": NOISE}}
EARLY_MEANS = {"record_means": True, "sampling": {"eta": NOISE, **EARLY}}
METHODS = {
    "d3po": Method("d3po", 64, 16, {"source": {**D3PO, "sampling": EARLY}, "train": {"batch_size": 32}}),
    "d3po-every-step": Method("d3po", 64, 16, {"source": D3PO, "train": {"batch_size": 32}}),
    # at beta 0.1 the gradients are of the size of Adam's usual epsilon
    "d3po-adam-1e-12": Method(
        "d3po", 64, 16, {"source": {**D3PO, "sampling": EARLY}, "train": {"batch_size": 32, "adam_eps": 1e-12}}
    ),
    "d3po-every-step-adam-1e-12": Method(
        "d3po", 64, 16, {"source": D3PO, "train": {"batch_size": 32, "adam_eps": 1e-12}}
    ),
    "d3po-normalized": _normalized("d3po", 16, {**D3PO, **EARLY_MEANS}, 32),
    "d3po-normalized-every-step": _normalized("d3po", 16, {**D3PO, **MEANS}, 32),
    # 4 + 1 + 4 * 15 of 80 rows are one chain's and its candidates': 65/20 pictures a prompt
    "spo": Method("spo", 65, 16, {"source": SPO, "train": {"batch_size": 32}}),
    "spo-0.15": Method("spo", 65, 16, {"source": {**SPO, "threshold": 0.15}, "train": {"batch_size": 32}}),
    # the same from a learned scorer that is told how noisy the preview's state was; it also learned how sure to be, and
    # so lets half as many pairs pass the threshold of 0.3
    "spo-step-aware": Method(
        "spo", 65, 16, {"source": {**SPO, "scorers": ["sprites_step_aware"]}, "train": {"batch_size": 32}}
    ),
    "spo-step-aware-0.15": Method(
        "spo",
        65,
        16,
        {"source": {**SPO, "scorers": ["sprites_step_aware"], "threshold": 0.15}, "train": {"batch_size": 32}},
    ),
    "spo-gold": Method("spo", 65, 16, {"source": GOLD_ON_PREVIEWS, "train": {"batch_size": 32}}),
    "spo-gold-early": Method(
        "spo", 37, 6, {"source": {**GOLD_ON_PREVIEWS, "last_step": LAST}, "train": {"batch_size": 32}}
    ),
    # the exact judge on what a candidate leads to: 133/20 pictures a prompt; both rows have fewer steps, as few pairs
    "spo-gold-ahead": Method(
        "spo",
        66,
        6,
        {
            "source": {**GOLD_ON_PREVIEWS, "prompts_per_round": 10, "last_step": LAST, "preview_steps": 4},
            "train": {"batch_size": 32},
        },
    ),
    "step-dpo": Method(
        "step-dpo",
        42,
        8,
        {"source": {"prompts_per_round": 40, "temperature": 0.1, "last_step": LAST}, "train": {"batch_size": 16}},
    ),
    "m-dpo": Method(
        "m-dpo",
        64,
        8,
        {"source": {"images_per_prompt": 4, "prompts_per_round": 16, "pairs": "all", "sampling": EARLY}}
        | {"train": {"batch_size": 8}},
    ),
    "m-dpo-normalized": _normalized("m-dpo", 8, {**D3PO, **EARLY_MEANS}, 8),
    "tree-po": Method(
        "tree-po",
        64,
        8,
        {"source": {"prompts_per_round": 16, "steps_used": 5, "sampling": EARLY}, "train": {"batch_size": 4}},
    ),
    "tree-po-normalized": _normalized(
        "tree-po", 8, {"prompts_per_round": 16, "steps_used": 5, "branch_at": 1, **EARLY_MEANS}, 4
    ),
    "flow-grpo": Method(
        "flow-grpo",
        64,
        16,
        {"source": {**GROUPS, "sampling": {"num_steps": STEPS, **EARLY}}, "train": {"batch_size": 8}},
    ),
    "grpo-guard": Method(
        "grpo-guard",
        64,
        16,
        {
            "source": {**GROUPS, "sampling": {"num_steps": STEPS, "eta": NOISE, **EARLY}},
            "objective": {"terms": [{"name": "grpo", "clip": 1e-4}, {"name": "kl", "weight": 0.004}]},
            "train": {"batch_size": 8},
        },
    ),
    "ddpo": Method("ddpo", 64, 16, {"source": {**GROUPS, "sampling": EARLY}, "train": {"batch_size": 8}}),
    "online-dpo": Method(
        "online-dpo",
        64,
        16,
        {"source": {"images_per_prompt": 4, "prompts_per_round": 16, "pairs": "all"}, "reference": _pool(16)}
        | {"objective": {"beta": BETA}, "train": {"batch_size": 16}},
    ),
    "sppo-iterative": Method(
        "sppo-iterative",
        64,
        16,
        {"source": {"images_per_prompt": 4, "prompts_per_round": 16, "pairs": "all"}, "reference": _pool(16)}
        | {"objective": {"beta": BETA, "nats": BETA}, "train": {"batch_size": 16}},
    ),
    "rso": _rso(0.5),
    # so sharp a tilt leaves some 140 pairs of 512 pictures, each seen 15 times
    "rso-0.1": _rso(0.1),
    "nft": Method(
        "nft",
        64,
        16,
        {
            "source": {"images_per_prompt": 8, "prompts_per_round": 8},
            "reference": _pool(16),
            "train": {"batch_size": 4},
        },
    ),
    "spo-winner": Method("spo", 65, 16, {"source": {**SPO, "go_on": "winner"}, "train": {"batch_size": 32}}),
    # the same pairs and reference, from the policy's pictures and from the base's
    "own-dpo": _dpo("policy"),
    "foreign-dpo": _dpo("reference"),
    "xpo": Method(
        "xpo",
        64,
        16,
        {"source": {"prompts_per_round": 32}, "train": {"batch_size": 8}}
        | {"objective": {"terms": [{"name": "pair", "beta": BETA}, EXPLORE]}},
    ),
    "seppo": _seppo("seppo"),
    # the anchor's sign of eight draws in place of one, and no flip at all, which is Diffusion-DPO against the rivals
    "seppo-draws": _seppo("seppo", likelihood={"draws": 8}),
    # the same with the paper's reference, any of the last seven
    "seppo-draws-random": _seppo("seppo", likelihood={"draws": 8}, reference=_pool(16, "random", 7)),
    "seppo-draws-rendered": _seppo("seppo", "rendered", likelihood={"draws": 8}),
    "seppo-draws-random-rendered": _seppo(
        "seppo", "rendered", likelihood={"draws": 8}, reference=_pool(16, "random", 7)
    ),
    "seppo-no-flip": _seppo("seppo", objective={"beta": BETA, "flip": "none"}),
    "sspo": _seppo("sspo"),
    "seppo-rendered": _seppo("seppo", "rendered"),
    "seppo-no-flip-rendered": _seppo("seppo", "rendered", objective={"beta": BETA, "flip": "none"}),
    "sspo-rendered": _seppo("sspo", "rendered"),
    # what of it is fine-tuning on the winners
    "sft": _offline("sft", "base's", 8),
    "sft-rendered": _offline("sft", "rendered", 8),
    "reward-po": _rivals(
        "reward-po",
        source={"steps_per_round": 16, "scorers": [GOLD]},
        objective={"terms": [SOFT_PAIR, {"name": "sft", "candidates": [0], "weight": 1.0}]},
    ),
    "hypo": _rivals("hypo", objective={"terms": [{"name": "pair", "beta": BETA, "candidates": [0, 1]}, KL_ON_RIVALS]}),
    "offline-dpo": _offline("diffusion-dpo", "base's", 16, objective={"beta": BETA}),
    "offline-dpo-seconds": _offline("diffusion-dpo", "base's", 16, objective={"beta": BETA}),
}


def sections_of(method: Method, model: str) -> dict[str, Any]:
    """The method's sections with the model's own numbers in their places."""
    return dict(_filled(method.sections, OF_MODEL[model]))


def _filled(value: Any, values: dict[str, float]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item, values) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, values) for item in value]
    return values.get(value, value) if isinstance(value, str) else value
