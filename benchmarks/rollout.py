"""What sampling while training costs: folded calls with cached text against one call per image and branch.

    python benchmarks/rollout.py                    # on sprites-sdxl, a few minutes on one core
    python benchmarks/rollout.py --model sprites-sd3 --prompts 16

Three tables in one results file, benchmarks/results/rollout-<model>.json:
- trajectories (source.name=rollout): pictures per second of a part, against the plain scheme: every picture on its own,
  its prompt encoded for it, the two branches of guidance in two calls;
- candidates (source.name=branching, SPO's settings): the same, and rows of the network per kept pair;
- the training step of a pair that shares its x_t: one evaluation against two.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign._json import write_json
from diffalign.config import resolve
from diffalign.recipes._run import environment
from diffalign.recipes.train import set_up
from diffalign.sources._rounds import Place
from diffalign.types import StepBatch

REPEATS = 3


@dataclass
class Plain:
    """The policy as a plain script calls it: one row per call, each prompt encoded when it is needed."""

    policy: Any
    calls: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def __call__(self, xt: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        rows = []
        for i in range(len(xt)):
            self.calls += 1
            rows.append(
                self.policy(xt[i : i + 1], t[i : i + 1], {key: value[i : i + 1] for key, value in cond.items()})
            )
        return torch.cat(rows)

    def decode(self, latents: Tensor) -> Tensor:
        """One picture per call."""
        return torch.cat([self.policy.decode(latents[i : i + 1]) for i in range(len(latents))])


def fastest(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few repeats, after one that does not count."""
    work()
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def trainer_of(model: str, method: str, prompts: int, folder: Path) -> Any:
    """A trainer whose source makes one part of that many prompts."""
    source = {"prompts": f"sprites:train:{prompts}:two", "scorers": ["sprites_gold"], "prompts_per_round": prompts}
    source |= {"keep_images": False} if method != "spo" else {"temperature": 0.1}
    source |= {"cache_dir": str(folder / "cache"), "sampling": {"num_steps": 20, "cfg_scale": 3.0, "batch_size": 4096}}
    train = {"out": str(folder / method), "batch_size": 4}
    return set_up(resolve([model, method, {"source": source, "train": train, "log": {"trackers": []}}]))


def sampling_rows(trainer: Any, images: int) -> dict[str, float]:
    """A part made both ways."""
    maker = trainer.batches.maker
    counted: dict[str, float] = {}
    calls = 0

    def make() -> None:
        nonlocal calls
        calls = 0
        counted.update(maker.make(Place(0, 0, 0))[1])

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = trainer.model.network.register_forward_hook(hook)
    folded = fastest(make)
    folded_calls = calls
    handle.remove()
    plain = Plain(trainer.model)
    texts = maker.cond.prompts

    def one_by_one() -> None:
        for text in [texts[i % len(texts)] for i in range(images)]:
            trainer.model.encode_prompts([text])
        users = [maker, maker.recorder] if hasattr(maker, "recorder") else [maker]
        for user in users:
            user.policy = plain
        try:
            plain.calls = 0
            maker.make(Place(0, 0, 0))
        finally:
            for user in users:
                user.policy = trainer.model

    seconds = fastest(one_by_one)
    result = {
        "images": images,
        "network_rows": counted["network_rows"],
        "calls_folded": folded_calls,
        "calls_plain": plain.calls,
        "images_per_second": images / folded,
        "images_per_second_plain": images / seconds,
        "ratio": seconds / folded,
    }
    kept = sum(value for name, value in counted.items() if name.startswith("kept_"))
    return result | ({"pairs": kept, "rows_per_pair": counted["network_rows"] / kept} if kept else {})


def step_rows(trainer: Any, batch: StepBatch) -> dict[str, float]:
    """Forward and backward of pairs that share x_t, evaluated once and twice."""
    apart = replace(batch, xt=batch.xt.expand(-1, 2, -1, -1, -1, -1))

    def backward(of: StepBatch) -> None:
        likelihoods = trainer.config.likelihood(trainer.model, trainer.reference, of)
        trainer.config.objective(likelihoods).loss.backward()
        trainer.optimizer.zero_grad()

    once, twice = fastest(lambda: backward(batch)), fastest(lambda: backward(apart))
    return {
        "pairs": len(batch),
        "milliseconds_shared": 1000 * once,
        "milliseconds_apart": 1000 * twice,
        "ratio": twice / once,
    }


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sprites-sdxl")
    parser.add_argument("--prompts", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = trainer_of(arguments.model, "d3po", arguments.prompts, folder)
        result: dict[str, Any] = {"trajectories": sampling_rows(own, 2 * arguments.prompts)}
        spo = trainer_of(arguments.model, "spo", arguments.prompts, folder)
        source = spo.config.source
        chains = arguments.prompts * source.candidates
        result["candidates"] = sampling_rows(spo, chains)
        spo.batches.refresh(0)
        result["step"] = step_rows(spo, spo.batches.batch(0))
    result["environment"] = environment("cpu")
    path = Path(__file__).parent / "results" / f"rollout-{arguments.model}.json"
    write_json(path, result)
    for part in ("trajectories", "candidates", "step"):
        print(part, {key: round(value, 3) for key, value in result[part].items()})


if __name__ == "__main__":
    main()
