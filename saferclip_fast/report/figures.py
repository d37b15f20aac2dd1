"""The report's figures: retrieval, losses, maps, safety against usefulness, a guard, a gate, a restoration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from ..results import PAGE, UNSAFE_RATE, at, cutoffs, is_number, of_any_cutoff
from .charts import Chart, Figure, Group, Legend, Point, padded
from .load import Run

LINE_POINTS = 300  # of a loss curve, means of what lies between


def color(index: int) -> str:
    """The class of a run's color and dashes."""
    return f"run{index % 4}"


def _series(runs: Sequence[Run]) -> tuple[list[tuple[int, str, str]], Legend]:
    """(run, side, class) of every line: the frozen model where all share it, then the tuned ones; and the legend."""
    frozen = [i for i, run in enumerate(runs) if "frozen" in run.sides]
    shared = len(frozen) == len(runs) and same_frozen(runs)
    lines = [(0, "frozen", "before")] if shared else []
    legend = [("before", "before")] if shared else []
    for i, run in enumerate(runs):
        lines.append((i, "tuned", color(i)))
        legend.append((color(i), run.name if len(runs) > 1 else "after"))
    return lines, legend


def same_data(runs: Sequence[Run]) -> bool:
    """Whether all runs were measured on the same samples."""
    return len({(run.evaluation["settings"].get("data_hash"), run.evaluation.get("rows")) for run in runs}) == 1


def same_frozen(runs: Sequence[Run]) -> bool:
    """Whether all runs started from the same weights and were measured on the same samples."""
    frozen = {run.evaluation["models"].get("frozen", {}).get("weights_hash") for run in runs}
    return len(frozen) == 1 and None not in frozen and same_data(runs)


def retrieval(runs: Sequence[Run]) -> list[Group]:
    """Every rate against K, the items looked at; grouped by what should happen to it."""
    lines, legend = _series(runs)
    metrics = runs[0].evaluation["metrics"]
    families: dict[str, dict[int, str]] = {}
    for name in metrics:
        names = cutoffs(name, metrics)
        if names and "unsafe_share" not in name:  # the share is in the table of all metrics
            families[name.rpartition("@")[0]] = names
    groups: dict[str | None, list[Figure]] = {"falls": [], "rises": [], "stays": [], None: []}
    for names in families.values():
        first = metrics[next(iter(names.values()))]
        figure = Figure(of_any_cutoff(first["label"]), _by_cutoff(runs, lines, names))
        groups[first["wanted"]].append(figure)
    titles = {"falls": "Should fall", "rises": "Should rise", "stays": "Should stay", None: "Not aimed at"}
    legend = [*legend, ("chance", "by chance")]
    return [Group(titles[wanted], figures, legend) for wanted, figures in groups.items() if figures]


def _by_cutoff(runs: Sequence[Run], lines: Sequence[tuple[int, str, str]], names: dict[int, str]) -> Markup:
    last = len(names) - 1
    chart = Chart(
        _described(runs, lines, names.get(PAGE, next(iter(names.values())))),
        (-0.15, max(last, 1) + 0.15),
        (0, 100),
        x_label="items looked at (K)",
        x_ticks=[(i, str(k)) for i, k in enumerate(names)],
        y_ticks=[(v, f"{v} %") for v in (0, 25, 50, 75, 100)],
        height=190,
    )
    entries = [runs[0].evaluation["metrics"][name] for name in names.values()]
    if all("chance" in entry for entry in entries):
        chart.line([(float(i), 100 * entry["chance"]) for i, entry in enumerate(entries)], "chance")
    for index, side, kind in lines:
        metrics = runs[index].evaluation["metrics"]
        known = [(i, metrics[name]) for i, name in enumerate(names.values()) if name in metrics]
        found = [(i, entry[side]) for i, entry in known]
        if found:
            chart.band([(i, 100 * e["low"], 100 * e["high"]) for i, e in found], kind)
            points = [(float(i), 100 * e["value"]) for i, e in found]
            chart.line(points, kind)
            chart.dots(points, f"point {kind}")
    return chart.svg()


def _described(runs: Sequence[Run], lines: Sequence[tuple[int, str, str]], name: str) -> str:
    """The values of the metric `name`, for who cannot see the chart."""
    said = []
    for index, side, _ in lines:
        entry = runs[index].evaluation["metrics"].get(name)
        if entry is not None:
            said.append(f"{runs[index].name} {side} {100 * entry[side]['value']:.1f} %")
    return f"{runs[0].evaluation['metrics'][name]['label']}: " + ", ".join(said)


def losses(runs: Sequence[Run]) -> list[Group]:
    """The loss and each of its terms against the step, training as lines, validation as points."""
    names: list[str] = []
    for run in runs:
        for line in run.log:
            names += [name for name in line if name not in names]
    names = [name for name in names if name not in ("kind", "step", "epoch", "lr", "samples_per_second")]
    legend = [(color(i), run.name if len(runs) > 1 else "training") for i, run in enumerate(runs)]
    legend += [("val", "validation")] if any(line.get("kind") == "val" for run in runs for line in run.log) else []
    drawn = [(name, _loss(runs, name)) for name in names]
    figures = [Figure(name.replace("_", " "), svg) for name, svg in drawn if svg is not None]
    return [Group("Loss and its terms", figures, legend)] if figures else []


def _loss(runs: Sequence[Run], name: str) -> Markup | None:
    curves: list[tuple[str, list[Point], list[Point]]] = []
    for i, run in enumerate(runs):
        train, val = (_values(run.log, kind, name) for kind in ("train", "val"))
        curves.append((color(i), _thinned(train), val))
    points = [point for _, train, val in curves for point in train + val]
    if not points:
        return None
    last = max(points)[0]
    x = (0.0, last or 1.0)
    description = f"{name} from {points[0][1]:.4g} to {curves[0][1][-1][1] if curves[0][1] else points[-1][1]:.4g}"
    chart = Chart(description, x, padded(y for _, y in points), x_label="step", height=190)
    for kind, train, val in curves:
        if train:
            chart.line(train, kind)
        chart.dots(val, f"point val {kind}")
    return chart.svg()


def _values(log: Iterable[dict[str, Any]], kind: str, name: str) -> list[Point]:
    found = [(line["step"], line[name]) for line in log if line.get("kind") == kind and name in line]
    return [(float(x), float(y)) for x, y in found if is_number(y) and not math.isnan(y)]


def _thinned(points: list[Point]) -> list[Point]:
    size = math.ceil(len(points) / LINE_POINTS) if points else 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


_GUARDED = {"text": "captions", "image": "images"}
SAFETY = at(UNSAFE_RATE)
UTILITY = ("zero_shot", at("S-V.text_to_image", 1))  # the first that all runs have; at rank 10 recall shows no price


def tradeoff(runs: Sequence[Run]) -> Group | None:
    """Safety against usefulness: each run as a point with its intervals, and the safety dial as a line. Up and right
    is better."""
    useful = next((name for name in UTILITY if all(name in run.evaluation["metrics"] for run in runs)), None)
    if useful is None or not all(SAFETY in run.evaluation["metrics"] for run in runs):
        return None
    alone = len(runs) == 1
    measured = [(_both(run.evaluation["metrics"], side, useful), kind, word) for run, side, kind, word in _points(runs)]
    dials = {color(i): _dial(run, useful) for i, run in enumerate(runs)}
    reached = [point for points in dials.values() for _, point in points]
    chart = Chart(
        ", ".join(f"{word}: safety {b[0]:.1f} %, usefulness {a[0]:.1f} %" for (a, b), _, word in measured),
        padded([v for (a, _), *_ in measured for v in a] + [x for x, _ in reached], 0.1),
        padded([v for (_, b), *_ in measured for v in b] + [y for _, y in reached], 0.1),
        x_label=f"{runs[0].evaluation['metrics'][useful]['label']} (%) →",
        y_label=f"nothing unsafe in the first {PAGE} (%) →",
        height=300,
    )
    for kind, points in dials.items():
        if points:
            chart.line([point for _, point in points], kind)
            chart.dots([point for _, point in points], f"point {kind}")
        for alpha, point in points if alone else ():
            if alpha not in (0, 1):  # these two are the models themselves
                chart.word(point, f"{alpha:g}")
    for (a, b), kind, word in measured:
        chart.cross(a, b, kind, word)
    return Group("", [Figure("", chart.svg())], [("run0", "safety dial, with its α")] if alone and reached else [])


def _points(runs: Sequence[Run]) -> list[tuple[Run, str, str, str]]:
    """(run, side, class, word) of every measured model; a frozen one that all share once."""
    shown = []
    for i, run in enumerate(runs):
        if "frozen" in run.sides and (i == 0 or not same_frozen(runs)):
            shown.append((run, "frozen", "before", "before"))
        shown.append((run, "tuned", color(i), "after" if len(runs) == 1 else run.name))
    return shown


Triple = tuple[float, float, float]


def _both(metrics: dict[str, Any], side: str, useful: str) -> tuple[Triple, Triple]:
    """(usefulness, safety), each (value, low, high) in percent."""
    x, y = (metrics[name][side] for name in (useful, SAFETY))
    return (
        (100 * x["value"], 100 * x["low"], 100 * x["high"]),
        (100 - 100 * y["value"], 100 - 100 * y["high"], 100 - 100 * y["low"]),
    )


def _dial(run: Run, useful: str) -> list[tuple[float, Point]]:
    """(alpha, point) of the run's safety dial, in order; empty where there is none."""
    points = [point for point in (run.dial or {}).get("points", ()) if {SAFETY, useful} <= set(point["metrics"])]
    found = [(p["alpha"], p["metrics"][useful]["value"], p["metrics"][SAFETY]["value"]) for p in points]
    return [(alpha, (100 * x, 100 - 100 * y)) for alpha, x, y in sorted(found)]


def gate(run: Run) -> Group | None:
    """What a gate keeps, its safety and its usefulness along the threshold; None where the run is no gate."""
    points = [point for point in (run.gate or {}).get("points", ()) if not point["chosen"]]
    if run.gate is None or len(points) < 2:
        return None
    values = {
        "safe items kept bit for bit": [50 * sum(point["kept"].values()) for point in points],
        f"nothing unsafe in the first {PAGE}": [
            100 - 100 * point["metrics"][run.gate["safety"]]["value"] for point in points
        ],
        points[0]["metrics"][run.gate["utility"]]["label"]: [
            100 * point["metrics"][run.gate["utility"]]["value"] for point in points
        ],
    }
    ticks = [(float(place), f"{point['thresholds']['text']:g}") for place, point in enumerate(points)]
    percent = [(float(v), f"{v} %") for v in (0, 25, 50, 75, 100)]
    described = "; ".join(f"{name} from {line[0]:.1f} to {line[-1]:.1f} %" for name, line in values.items())
    limits = (0.0, len(points) - 1.0)
    chart = Chart(described, limits, (0, 100), x_label="threshold", x_ticks=ticks, y_ticks=percent)
    for i, line in enumerate(values.values()):
        chart.line(list(enumerate(line)), color(i))
        chart.dots(enumerate(line), f"point {color(i)}")
    return Group(run.name, [Figure("", chart.svg())], [(color(i), name) for i, name in enumerate(values)])


def guard(run: Run) -> Group | None:
    """A guard's ROC and reliability curves, of captions and images; None where the run has none."""
    if run.guard is None:
        return None
    ticks = [(v, f"{v} %") for v in (0, 25, 50, 75, 100)]
    known = {color(i): (word, run.guard["modalities"].get(name)) for i, (name, word) in enumerate(_GUARDED.items())}
    found = {kind: (word, entry) for kind, (word, entry) in known.items() if entry is not None}
    described = [f"{word}: area {entry['auroc']['value']:.3f}" for word, entry in found.values()]
    errors = [f"{word}: calibration error {entry['ece']:.3f}" for word, entry in found.values()]
    roc = Chart(
        f"ROC, {', '.join(described)}", (0, 100), (0, 100), x_label="false alarms", x_ticks=ticks, y_ticks=ticks
    )
    reliability = Chart(
        f"reliability, {', '.join(errors)}", (0, 100), (0, 100), x_label="P(unsafe)", x_ticks=ticks, y_ticks=ticks
    )
    for chart in (roc, reliability):
        chart.line([(0, 0), (100, 100)], "chance")
    legend: Legend = []
    for kind, (word, entry) in found.items():
        area = "{value:.3f} ({low:.3f} to {high:.3f})".format(**entry["auroc"])
        legend.append((kind, f"{word}: area under ROC {area}, calibration error {entry['ece']:.3f}"))
        roc.line([(0, 0), *((100 * p["false_alarms"], 100 * p["found"]) for p in entry["roc"])], kind)
        points = [(100 * part["predicted"], 100 * part["observed"]) for part in entry["reliability"]]
        reliability.line(points, kind)
        reliability.dots(points, f"point {kind}")
    title = f"{run.name}, on {run.guard['data']['test']['rows']:,} rows"
    return Group(title, [Figure("unsafe items found", roc.svg()), Figure("unsafe share", reliability.svg())], legend)


def restored(run: Run) -> Group | None:
    """rho of each weight that a later fine-tuning moved, lowest first; None where the run is no restored model."""
    if run.restored is None or not run.restored["layers"]:
        return None
    layers, threshold = sorted(run.restored["layers"], key=lambda layer: layer["rho"]), run.restored["threshold"]
    words = {True: "safe change added", False: "left as it is"}
    counts = {changed: sum(layer["changed"] is changed for layer in layers) for changed in words}
    legend = [(color(i), f"{words[changed]}: {counts[changed]}") for i, changed in enumerate(words)]
    described = f"rho of {len(layers)} weights; {', '.join(text for _, text in legend)}; threshold {threshold:g}"
    chart = Chart(described, (0, len(layers) + 1), (0, 1), x_label="weights, by rho", y_label="rho")
    if threshold <= 1:
        chart.line([(0, threshold), (len(layers) + 1, threshold)], "chance")
    for i, changed in enumerate(words):
        points = [(place, layer["rho"]) for place, layer in enumerate(layers, 1) if layer["changed"] is changed]
        chart.dots(points, f"point {color(i)}")
    return Group(run.name, [Figure("", chart.svg())], legend)
