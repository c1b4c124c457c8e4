"""Run folders read back: which there are, how they stand, and curves that follow a growing file."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffalign import _run_lock, runs
from diffalign.runs import _curves
from diffalign.runs._charts import Drawer
from diffalign.runs._curves import Curves, Series

CONFIG = {
    "model": {"name": "sdxl", "path": "tiny"},
    "source": {"name": "offline"},
    "objective": {"name": "pair", "beta": 500.0},
    "train": {"steps": 100, "batch_size": 8, "out": None},
    "stop": {"train_scorer": "proxy"},
}


def make(folder: Path, rows: list[dict[str, Any]] | None = None, **sections: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | sections, sort_keys=False))
    write(folder, rows if rows is not None else [{"step": step, "loss": 1 / (step + 1)} for step in range(10)])
    return folder


def write(folder: Path, rows: list[dict[str, Any]], mode: str = "w") -> None:
    with open(folder / "metrics.jsonl", mode) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def values(curves: Curves, name: str = "loss") -> list[float]:
    return curves.series[name].points[1]


def test_runs_are_found_wherever_they_are_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "plain")
    make(tmp_path / "sweep" / "runs" / "beta-1-seed0")
    make(tmp_path / "staged" / "stage-1")
    make(tmp_path / "plain" / "inner")  # below a run: its own affair
    make(tmp_path / ".hidden" / "run")
    make(tmp_path / "deep" / "/".join("abcdefghij"))
    make(tmp_path / "elsewhere" / "real")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images").mkdir()
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "config.yaml").write_text("evaluate: {}")
    names = {run.name for run in runs.find_runs([tmp_path])}
    assert names == {"plain", "sweep/runs/beta-1-seed0", "staged/stage-1", "elsewhere/real"}
    assert runs.find_runs([tmp_path / "root"]) == []
    assert [run.name for run in runs.find_runs([tmp_path / "plain"])] == ["plain"]


def test_the_walk_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        make(tmp_path / f"run-{number}")
    monkeypatch.setattr(runs, "MAX_RUNS", 3)
    assert len(runs.find_runs([tmp_path])) == 3
    monkeypatch.setattr(runs, "MAX_FOLDERS", 3)
    assert len(runs.find_runs([tmp_path])) == 2  # the root and two runs


def test_how_a_run_stands(tmp_path: Path) -> None:
    run = runs.read_run(make(tmp_path / "a"))
    assert (run.state, run.step, run.steps, run.method) == ("interrupted", 10, 100, "pair, beta 500")
    assert run.seconds_left is None
    check = tmp_path / "a" / "export_check.json"
    check.write_text(json.dumps({"steps": 60, "problems": [], "ended_early": "no better"}))
    run = runs.read_run(tmp_path / "a")
    assert (run.state, run.step, run.reason) == ("finished", 60, "no better")
    check.write_text(json.dumps({"steps": 100, "problems": ["all weights are zero"]}))
    assert (runs.read_run(tmp_path / "a").state, runs.read_run(tmp_path / "a").reason) == (
        "failed",
        "all weights are zero",
    )


def test_running_is_told_by_the_lock_alone(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", [{"step": 19, "loss": 1.0, "pairs_per_second": 4.0}])
    with _run_lock.hold(folder):
        run = runs.read_run(folder)
        assert run.state == "running" and run.seconds_left == (100 - 20) * 8 / 4
    with pytest.raises(RuntimeError), _run_lock.hold(folder):
        raise RuntimeError("out of memory")
    assert (runs.read_run(folder).state, runs.read_run(folder).reason) == ("failed", "out of memory")


def test_broken_files_are_runs_without_facts(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    (folder / "config.yaml").write_text("{broken")
    (folder / "export_check.json").write_text("[")
    (folder / "metrics.jsonl").write_bytes(b"\xff\xfe\n{\n")
    run = runs.read_run(folder)
    assert run.state == "interrupted" and run.step == 0 and run.steps is None
    assert runs.RunView(folder).config_text == ""


def test_links_out_of_a_run_folder_are_not_followed(tmp_path: Path) -> None:
    folder = make(tmp_path / "roots" / "a")
    (tmp_path / "secret.yaml").write_text("password: x")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "step-00000001.png").write_bytes(b"png")
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").symlink_to(tmp_path / "secret.yaml")
    (folder / "samples").symlink_to(tmp_path / "secrets")
    view = runs.RunView(folder)
    assert view.config == {} and view.config_text == "" and view.samples() == {}
    (folder / "samples").unlink()
    (folder / "samples").mkdir()
    (folder / "samples" / "step-00000001.png").symlink_to(tmp_path / "secrets" / "step-00000001.png")
    assert view.samples() == {}


def test_sample_grids_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    (folder / "samples").mkdir()
    for name in ("step-00000100", "step-00000000", "step-00000020", "step-x", "other"):
        (folder / "samples" / f"{name}.png").write_bytes(b"png")
    assert list(runs.RunView(folder).samples()) == [0, 20, 100]


def test_configs_differ_by_key(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", objective={"name": "pair", "beta": 900.0}, train=CONFIG["train"] | {"ema": 0.9})
    assert runs.config_differences(tmp_path / "a", tmp_path / "b") == [
        ("objective.beta", 500.0, 900.0),
        ("train.ema", None, 0.9),
    ]
    assert runs.config_differences(tmp_path / "a", tmp_path / "a") == []


def test_events_are_told(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", [{"step": 0, "loss": 1.0}])
    (folder / "alarm.json").write_text(json.dumps({"step": 40, "reason": "proxy rises alone"}))
    (folder / "export_check.json").write_text(json.dumps({"steps": 50, "exported_step": 30, "problems": []}))
    events = runs.RunView(folder).events()
    assert "after step 40: proxy rises alone" in events[0] and "after step 30" in events[1] and len(events) == 2


def test_a_growing_file_is_read_on(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", [])
    curves = Curves(folder)
    assert not curves.refresh() or curves.series == {}
    write(folder, [{"step": 0, "loss": 3.0}], "a")
    assert curves.refresh() and values(curves) == [3.0]
    version = curves.version
    assert not curves.refresh() and curves.version == version
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "lo')  # half a line, as a reader may meet it
    assert not curves.refresh() and values(curves) == [3.0]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('ss": 2.0}\n')
    assert curves.refresh() and values(curves) == [3.0, 2.0] and curves.step == 1 and curves.num_bad == 0


def test_values_are_numbers_and_bad_lines_are_counted(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", [{"step": 0, "loss": None, "note": "x", "flag": True, "margin": 1, "alarm": 0.0}])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('not json\n[1]\n{"loss": 1}\n{"step": 5, "loss": NaN, "margin": 2, "alarm": 1.0}\n')
    curves = Curves(folder)
    curves.refresh()
    assert set(curves.series) == {"margin"} and values(curves, "margin") == [1, 2]
    assert curves.num_bad == 3 and curves.alarms == [5]


@pytest.mark.parametrize("longer", [False, True])
def test_a_cut_or_rewritten_file_is_read_anew(tmp_path: Path, longer: bool) -> None:
    """A resumed run cuts its file, and may have grown beyond its old end by the next look."""
    folder = make(tmp_path / "a", [{"step": step, "loss": 1.0} for step in range(10)])
    curves = Curves(folder)
    curves.refresh()
    write(folder, [{"step": step, "loss": 2.0} for step in range(30 if longer else 4)])
    curves.refresh()
    assert values(curves) == [2.0] * (30 if longer else 4)
    (folder / "metrics.jsonl").unlink()
    assert curves.refresh() and curves.series == {} and not curves.refresh()


def test_a_long_file_is_read_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_curves, "SLICE", 100)
    folder = make(tmp_path / "a", [{"step": step, "loss": float(step)} for step in range(50)])
    curves, looks = Curves(folder), 0
    while curves.refresh():
        looks += 1
    assert looks > 5 and values(curves) == [float(step) for step in range(50)] and curves.unread == 0


def test_a_thinned_series_keeps_every_extreme_and_the_mean() -> None:
    """Spikes are what one looks for in a long run: none may be thinned away."""
    series, num = Series(), 20_000
    truth = [math.sin(step / 500) + (9.0 if step == 12_345 else -7.0 if step == 7 else 0.0) for step in range(num)]
    for step, value in enumerate(truth):
        series.append(step, value)
    steps, found = series.points
    assert len(series.stretches) <= _curves.MAX_STRETCHES and len(found) <= 2 * _curves.MAX_STRETCHES
    assert max(found) == truth[12_345] and min(found) == truth[7] and steps[found.index(max(found))] == 12_345
    assert steps == sorted(set(steps)) and all(value == truth[step] for step, value in zip(steps, found, strict=True))
    assert series.last == truth[-1] and sum(stretch.count for stretch in series.stretches) == num
    mean = sum(stretch.count * stretch.mean for stretch in series.stretches) / num
    assert mean == pytest.approx(sum(truth) / num, abs=1e-9)


def test_smoothing_leaves_constants_and_forgets_the_past() -> None:
    series = Series()
    for step in range(200):
        series.append(step, 2.0 if step < 100 else 5.0)
    steps, smooth = series.smooth(share=0.05)
    assert smooth[:100] == pytest.approx([2.0] * 100) and smooth[-1] == pytest.approx(5.0, abs=1e-3)
    assert len(steps) == len(smooth) == 200 and 2 < smooth[105] < 5
    one = Series()
    one.append(0, 3.0)
    assert one.smooth()[1] == [3.0]


def curves_of(folder: Path, rows: list[dict[str, Any]]) -> Curves:
    curves = Curves(make(folder, rows))
    curves.refresh()
    return curves


ROWS = [
    {"step": step, "loss": 0.7 - step / 200, "margin": step / 10, "winner_error_gap": 0.0, "own_metric": step}
    | {"implicit_accuracy": 0.5, "implicit_accuracy/t0.0-0.5": 0.2, "implicit_accuracy/t0.5-1.0": 0.9}
    for step in range(50)
]


def test_charts_are_drawn_for_what_was_logged_and_nothing_else(tmp_path: Path) -> None:
    groups = Drawer().groups({"A": curves_of(tmp_path / "a", ROWS)}, {"A": None})
    charts = {chart.title: chart for group in groups for chart in group.charts}
    assert {"Loss", "Margin", "Implicit accuracy", "Accuracy by noise level", "own_metric"} <= set(charts)
    assert "Held-out ranking" not in charts and "Gradient norm" not in charts
    assert not any("t0.0" in title or "proxy" in title.lower() for title in charts)
    assert charts["Margin"].values == (("training", 4.9),)
    assert dict(charts["Accuracy by noise level"].values) == pytest.approx({"t 0 to 0.5": 0.2, "t 0.5 to 1": 0.9})
    assert all(chart.svg.startswith("<svg") and chart.svg.rstrip().endswith("</svg>") for chart in charts.values())
    assert Drawer().groups({"A": curves_of(tmp_path / "none", [])}, {}) == []


def test_the_values_under_the_pointer_are_those_of_the_step(tmp_path: Path) -> None:
    groups = Drawer().groups({"A": curves_of(tmp_path / "a", ROWS)}, {"A": None}, smooth=False)
    loss = groups[0].charts[0]
    told = re.findall(r"<title>loss ([\d.]+) \(step (\d+)\)</title>", loss.svg)
    assert len(told) == 60 and told[0][1] == "0" and told[-1][1] == "49"
    assert all(float(value) == pytest.approx(0.7 - int(step) / 200, abs=1e-4) for value, step in told)


@pytest.mark.parametrize("least", [0.5, 1e-4])
def test_a_logarithmic_loss_has_plain_numbers_at_its_ticks(tmp_path: Path, least: float) -> None:
    rows = [{"step": step, "loss": 0.7 * (least / 0.7) ** (step / 49)} for step in range(50)]
    svg = Drawer().groups({"A": curves_of(tmp_path / "a", rows)}, {}, log=True)[0].charts[0].svg
    ticks = [float(text) for text in re.findall(r"<text[^>]*>([\d.e-]+)</text>", svg)]
    inside = [tick for tick in ticks if least * 0.9 <= tick <= 0.8]
    assert "math" not in svg and len(inside) >= 3


def test_two_runs_lie_over_each_other(tmp_path: Path) -> None:
    first, second = curves_of(tmp_path / "a", ROWS), curves_of(tmp_path / "b", ROWS[:20])
    groups = Drawer().groups({"A": first, "B": second}, {"A": None, "B": None})
    charts = {chart.title: chart for group in groups for chart in group.charts}
    assert [label for label, _ in charts["Loss"].values] == ["A", "B"]
    assert charts["Loss"].svg.count("stroke-dasharray") > Drawer().groups({"A": first}, {})[0].charts[0].svg.count(
        "stroke-dasharray"
    )
    assert {"Accuracy by noise level, A", "Accuracy by noise level, B"} <= set(charts)


def test_the_proxy_is_drawn_against_the_held_out_scorers(tmp_path: Path) -> None:
    """In standard errors of the first grid, with the alarm: scorers of different units share an axis."""
    rows = [
        {"step": step, "samples/proxy": 10.0 + step, "samples/proxy_se": 2.0, "samples/gold": 0.5 - step / 100}
        | {"samples/gold_se": 0.05, "samples/diversity": 2.0, "samples/diversity_se": 0.1, "alarm": float(step == 30)}
        for step in (0, 10, 20, 30)
    ]
    groups = Drawer().groups({"A": curves_of(tmp_path / "a", rows)}, {"A": "proxy"})
    chart = next(chart for group in groups for chart in group.charts if chart.title.startswith("Proxy"))
    assert dict(chart.values) == pytest.approx({"proxy (proxy)": 15.0, "gold": -6.0, "diversity": 0.0})
    without = [{**row, "alarm": 0.0} for row in rows]
    calm = Drawer().groups({"A": curves_of(tmp_path / "b", without)}, {"A": "proxy"})
    assert chart.svg != next(c for g in calm for c in g.charts if c.title.startswith("Proxy")).svg


def test_only_what_changed_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "a", ROWS)
    curves, drawer = Curves(folder), Drawer()
    curves.refresh()
    first = drawer.groups({"A": curves}, {"A": None})
    monkeypatch.setattr("diffalign.runs._charts.chart", lambda *a, **k: pytest.fail("drawn again"))
    assert drawer.groups({"A": curves}, {"A": None}) == first


def test_names_of_metrics_are_text(tmp_path: Path) -> None:
    rows = [{"step": step, "samples/<script>x</script>": float(step), "a<b": 1.0, "$\\frac$": 2} for step in range(3)]
    groups = Drawer().groups({"A": curves_of(tmp_path / "a", rows), "B": curves_of(tmp_path / "b", rows)}, {})
    assert not any("<script" in chart.svg or "a<b" in chart.svg for group in groups for chart in group.charts)
