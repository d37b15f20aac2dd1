"""The tables of README.md and benchmarks/README.md and the figures of docs/pictures, from the JSON of `make bench`.

    python -m benchmarks.render                 of benchmarks/results
    python -m benchmarks.render --results DIR   of other files, the same places

Tables stand between `<!-- benchmarks:begin -->` and `<!-- benchmarks:end -->`. Every *.json of the folder counts, so
the long ones that `make bench` leaves out (benchmarks/README.md) are shown where they are there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib

from benchmarks.differs import difference
from benchmarks.gpu import check
from benchmarks.harness import PYTORCH

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- benchmarks:begin -->\n).*?(<!-- benchmarks:end -->)", re.DOTALL)
PAGES = ("README.md", "benchmarks/README.md")
THEMES = {  # the report's colors
    "light": {"back": "#ffffff", "text": "#1b1f24", "line": "#d0d7de", "ours": "#0072b2", "torch": "#6e7781"},
    "dark": {"back": "#12161b", "text": "#e6e9ec", "line": "#38424d", "ours": "#56b4e9", "torch": "#9aa4af"},
}
MARKS = "†‡§¶‖"  # of the paths that differ from ours, in a table's order
ABOUT = {"threads", "revision", "date", "seconds", "rounds", "best_torch", "ladder", "compiled"}
Results = dict[str, dict]


def load(folder: Path) -> Results:
    """Name -> the file's content, in the order of the names."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def rows_of(results: Results, name: str) -> list[dict]:
    return results.get(name, {}).get("rows", [])


def threads(results: Results, name: str, row: dict) -> int:
    return row.get("threads", results[name]["machine"].get("threads"))


class Line(NamedTuple):
    """One line of the table and one bar of the figure."""

    operation: str
    size: str
    row: dict
    ours: str = "ours"
    rival: str | None = None  # another implementation that was timed, and what it is called
    rival_name: str = ""

    @property
    def speedup(self) -> float:
        return self.row["best_torch_ms"] / self.row[f"{self.ours}_ms"]

    @property
    def rival_speedup(self) -> str:
        if f"{self.rival}_ms" not in self.row:
            return ""
        return f"{self.rival_name}: {number(self.row[f'{self.rival}_ms'] / self.row[f'{self.ours}_ms'])}×"


def lines(results: Results) -> list[Line]:
    """The rows of README: the largest sizes, for the search few queries too, all cores."""
    found = []
    for name in ("nearest_safe", "nearest_safe_million"):
        for row in rows_of(results, name):
            chosen = row["k"] == 1 or (row["k"] == 32 and row["Q"] >= 1024)
            if chosen and (row["data"] == "clip_like" or row["N"] >= 10**6):
                queries = f"{row['Q']:,} queries" if row["Q"] > 1 else "1 query"
                size = f"{queries}, {row['N']:,} packed rows, k = {row['k']}"
                rival = min(LIBRARIES, key=lambda path: row.get(f"{path}_ms", math.inf))
                found.append(Line("nearest_safe", size, row, "ours_packed", rival, LIBRARIES[rival]))
    for name, rival, called in (("retarget_loss", "eager", "eager"), ("preservation_loss", "eager", "eager")):
        largest = [row for row in rows_of(results, name) if row["B"] == 8192 and row["d"] == 768]
        for row in largest:
            if row["pass"] == "both" and row.get("k", 1) == 1 and row["threads"] == most_threads(largest):
                found.append(Line(name, f"with gradients, B = {row['B']:,}", row, rival=rival, rival_name=called))
    for name, of in (("info_nce", "frozen columns"), ("objective", "bank of 50,000, k = 16")):
        rows = [row for row in rows_of(results, name) if row.get("chosen", 1.0) == 1.0]
        for row in sorted(rows, key=lambda row: (row["threads"], row["B"]))[-1:]:
            found.append(Line(CALLED[name], f"{of}, with gradients, B = {row['B']:,}", row, "ours", "eager", "eager"))
    for row in rows_of(results, "two_processes")[-1:]:
        size = f"{row['processes']} processes of one thread, bank of {row['bank_rows']:,}, B = {row['B']:,}"
        found.append(Line(CALLED["objective"], size, row))
    for row in rows_of(results, "bank"):
        if row["part"] == "embed":
            found.append(Line("bank embedding", f"{model(row)}, {row['B']} quadruplets", row, "ours", *AUTHORS))
    for row in rows_of(results, "train_step") or rows_of(results, "train_step_ladder"):
        found.append(Line("training step", f"{model(row)}, LoRA, batch {row['B']}", row, "ours", *AUTHORS))
    return found


AUTHORS = ("authors", "Safe-CLIP's code")
PACKAGES = {"faiss": ("faiss-cpu", "faiss-gpu"), "numkong": ("numkong",)}  # of a path: what a file's facts call them
LIBRARIES = {"faiss": "FAISS", "faiss_panorama": "FAISS Panorama", "numkong": "NumKong"}  # the fastest one is shown
CALLED = {"info_nce": "info_nce", "objective": "default objective"}


def model(row: dict) -> str:
    return row["model"].removesuffix("-quickgelu")


def most_threads(rows: Iterable[dict]) -> int:
    return max((row["threads"] for row in rows), default=0)


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}".rstrip(".")


def duration(ms: float) -> str:
    return f"{number(ms / 1e3)} s" if ms >= 1000 else f"{number(ms)} ms" if ms >= 1 else f"{number(ms * 1e3)} µs"


def table(head: list[str], body: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body))


def headline(results: Results) -> str:
    """The README's table, and what it was measured on."""
    body = []
    for line in lines(results):
        memory = [line.row.get(f"{name}_MiB") for name in (line.ours, "best_torch")]
        body.append(
            [
                line.operation,
                line.size,
                duration(line.row[f"{line.ours}_ms"]),
                f"{duration(line.row['best_torch_ms'])} ({line.row['best_torch'].replace('_', ' ')})",
                f"**{number(line.speedup)}×**",
                line.rival_speedup,
                "" if None in memory else " / ".join(f"{value:,.0f}" for value in memory),
            ]
        )
    head = ["operation", "size", "ours", "best PyTorch", "speed-up", "over others", "extra MiB, ours / PyTorch"]
    facts = "; ".join(dict.fromkeys(measured_on(found) for found in results.values() if "rows" in found))
    about = f"{facts}; float32, the ops at d = 768; {when(line.row for line in lines(results))}"
    return f"{table(head, body)}\n\n{about}."


def measured_on(found: dict) -> str:
    """The machine and the software of a file."""
    facts = found["machine"]
    parts = [str(facts[key]) for key in ("gpu", "cpu") if facts.get(key)]
    parts += [f"{facts['cores']} cores", facts["isa"]] if "isa" in facts else []
    # what is installed may not have run
    paths = {path for path in PACKAGES if any(f"{path}_ms" in row for row in found.get("rows", ()))}
    ran = [package for path in PACKAGES if path in paths for package in PACKAGES[path]]
    versions = ("torch", *ran, "transformers")
    return ", ".join([*parts, *(f"{name} {facts[name]}" for name in versions if name in facts)])


def when(rows: Iterable[dict]) -> str:
    """Commits and days of the rows."""
    days: dict[str, list[str]] = {}
    for row in rows:
        if "revision" in row and row["revision"] not in days.setdefault(row["date"], []):
            days[row["date"]].append(row["revision"])
    return ", ".join(f"{day} (commit {', '.join(commits)})" for day, commits in days.items())


def shared_facts(results: Results) -> str:
    """The machine that most files were measured on."""
    known = [measured_on(found) for found in results.values() if "rows" in found]
    return statistics.mode(known) if known else ""


def everything(results: Results) -> str:
    """Every row of every file but the sweep's, which is summed up."""
    shared = shared_facts(results)
    parts = [f"{shared}, float32. Milliseconds, in parentheses the extra MiB of a call."]
    for name, found in results.items():
        parts.append(f"### {name}")
        if "results" in found:
            parts.append(check.table(found))
            continue
        where = [measured_on(found)] if measured_on(found) != shared else []
        parts.append(", ".join([*where, when(found["rows"])]))
        parts += sweep_summary(found["rows"]) if len(found["rows"]) > 100 else all_rows(results, name)
    return "\n\n".join(parts)


def all_rows(results: Results, name: str) -> list[str]:
    """The values that all rows share, and a table of them: sizes that vary, milliseconds of every path, ratios."""
    rows = rows_of(results, name)
    timed = list(dict.fromkeys(key.removesuffix("_ms") for row in rows for key in row if key.endswith("_ms")))
    if any(path.startswith(PYTORCH) for path in timed):
        timed.remove("best_torch")
    sizes = dict.fromkeys(key for row in rows for key in row if is_case(key))
    values = {key: {str(row.get(key)) for row in rows} for key in sizes}
    varying = [key for key, seen in values.items() if len(seen) > 1]
    fixed = ", ".join(f"{key} = {rows[0][key]}" for key in values if key not in varying)
    ours = [path for path in timed if path.startswith("ours")]
    body = []
    for row in rows:
        cells = [f"{row[key]:,}" if isinstance(row.get(key), int) else str(row.get(key, "")) for key in varying]
        cells += [str(threads(results, name, row)), *(cell(row, f"{path}_ms", f"{path}_MiB") for path in timed)]
        body.append([*cells, *(cell(row, f"torch/{path}") for path in ours)])
    notes = {path: note for path in timed if (note := difference(name, path))}
    marks = dict(zip(dict.fromkeys(notes.values()), MARKS, strict=False))
    marked = [f"{path} {marks[notes[path]]}" if path in notes else path for path in timed]
    head = [*varying, "threads", *marked, *(f"best PyTorch / {path}" for path in ours)]
    below = "; ".join(f"{mark} {note}" for note, mark in marks.items())
    return [*filter(None, [fixed]), table([word.replace("_", " ") for word in head], body), *filter(None, [below])]


def is_case(key: str) -> bool:
    return key not in ABOUT and not key.endswith(("_ms", "_MiB")) and "/" not in key


def cell(row: dict, key: str, memory: str = "") -> str:
    """The number, with the extra MiB of the call in parentheses."""
    if key not in row:
        return ""
    return number(row[key]) + (f" ({row[memory]:,.0f})" if row.get(memory) is not None else "")


def sweep_summary(rows: list[dict]) -> list[str]:
    """The grid, and how the search does in it, as the rows are and packed."""
    ranges = {size: sorted({row[size] for row in rows}) for size in ("Q", "N", "d", "k")}
    grid = "; ".join(f"{size} {', '.join(f'{value:,}' for value in found)}" for size, found in ranges.items())
    found = [f"{len(rows)} cells: {grid}. Speed-up over the best PyTorch path:"]
    body = []
    for name, key in (("rows as they are", "torch/ours"), ("packed", "torch/ours_packed")):
        worst = min(rows, key=lambda row: row[key])
        where = ", ".join(f"{size} = {worst[size]:,}" for size in ranges)
        middle, slower = statistics.median(row[key] for row in rows), [row["N"] for row in rows if row[key] < 0.9]
        most = f"{max(slower):,}" if slower else ""
        body.append([name, number(middle), f"{number(worst[key])} ({where})", str(len(slower)), most])
    return [*found, table(["", "median", "least", "cells below 0.9", "the largest N of these"], body)]


# ---- Figures.
def digest(results: Results) -> str:
    """Stands in the figures, so that a test can tell which results they show."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()[:16]


def draw(results: Results, folder: Path) -> None:
    for theme, colors in THEMES.items():
        style = {
            **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), colors["back"]),
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colors["text"]),
            "axes.edgecolor": colors["line"],
            "grid.color": colors["line"],
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 11,
            "svg.hashsalt": "benchmarks",
        }
        with plt.rc_context(style):
            for name, figure in (("speedups", speedups(results, colors)), ("scaling", scaling(results, colors))):
                about = {"Date": None, "Description": digest(results)}
                figure.savefig(folder / f"{name}-{theme}.svg", metadata=about)
                plt.close(figure)


def speedups(results: Results, colors: dict[str, str]) -> plt.Figure:
    """A bar for each line of the table."""
    shown = lines(results)
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.55 * len(shown)), layout="constrained")
    axes.barh(range(len(shown)), [line.speedup for line in shown], 0.6, color=colors["ours"])
    axes.axvline(1, color=colors["torch"], lw=1.5)
    for place, line in enumerate(shown):
        rival = f"   (over {line.rival_speedup})" if line.rival_speedup else ""
        end = max(line.speedup, 1)
        axes.annotate(f"{number(line.speedup)}×{rival}", (end, place), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(shown)), [f"{line.operation}\n{line.size}" for line in shown], fontsize=9.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.65 * max((line.speedup for line in shown), default=1))
    axes.set_xlabel("times as fast as the best PyTorch path (the line: as fast)")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


PANELS = [  # file, what varies, title, our path, what is drawn
    ("nearest_safe_curves", "N", "nearest_safe, bank rows N", "ours_packed", "ms"),
    ("nearest_safe_curves", "Q", "nearest_safe, queries Q", "ours_packed", "ms"),
    ("nearest_safe_curves", "d", "nearest_safe, width d", "ours_packed", "ms"),
    ("nearest_safe_curves", "k", "nearest_safe, neighbors k", "ours_packed", "ms"),
    ("retarget_loss", "B", "retarget_loss, batch B", "ours", "ms"),
    ("retarget_loss", "d", "retarget_loss, width d", "ours", "ms"),
    ("preservation_loss", "B", "preservation_loss, batch B", "ours", "ms"),
    ("preservation_loss", "B", "preservation_loss, batch B", "ours", "MiB"),
]


def curve(rows: list[dict], varied: str) -> list[dict]:
    """The rows that differ from the most common values in `varied` alone, ordered by it."""
    keys = [key for key in rows[0] if is_case(key) and key != varied]
    base = {key: statistics.mode(row[key] for row in rows) for key in keys}
    return sorted((row for row in rows if base.items() <= row.items()), key=lambda row: row[varied])


def scaling(results: Results, colors: dict[str, str]) -> plt.Figure:
    """Time (and memory) against each size; a line style for each number of threads."""
    figure, panels = plt.subplots(2, 4, figsize=(13, 6.2), layout="constrained")
    labels: dict[str, object] = {}
    for axes, (name, varied, title, ours, unit) in zip(panels.flat, PANELS, strict=True):
        rows = rows_of(results, name)
        if not rows:
            axes.set_axis_off()
            continue
        counts = sorted({row["threads"] for row in rows}, reverse=True)
        for count, style in zip(counts[:1] if unit == "MiB" else counts, ("-", "--"), strict=False):
            points = curve([row for row in rows if row["threads"] == count], varied)
            for path, color, word in ((ours, "ours", "ours"), ("best_torch", "torch", "best PyTorch")):
                drawn = [(row[varied], row[f"{path}_{unit}"]) for row in points if row.get(f"{path}_{unit}")]
                if drawn:
                    label = f"{word}, {count} thread{'s' * (count > 1)}"
                    labels[label] = axes.plot(*zip(*drawn, strict=True), f"o{style}", color=colors[color], ms=4)[0]
        axes.set(xscale="log", yscale="log", title=title, ylabel={"ms": "ms", "MiB": "extra memory, MiB"}[unit])
        axes.title.set_fontsize(11)
        values = sorted({row[varied] for row in curve(rows, varied)})
        far = [value for value, after in zip(values, [*values[1:], math.inf], strict=False) if after > 2.5 * value]
        axes.set_xticks(far, [f"{value:,}" for value in far], fontsize=9.5)
        axes.minorticks_off()
        axes.grid(alpha=0.5)
    figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncol=4, frameon=False)
    return figure


def filled(page: str, text: str, results: Results) -> str:
    """The page's text with the tables of `results` between its markers."""
    block = headline(results) if page == "README.md" else everything(results)
    found, count = MARKED.subn(lambda match: f"{match[1]}\n{block}\n\n{match[2]}", text)
    if count != 1:
        raise ValueError(f"{page} must hold <!-- benchmarks:begin --> ... <!-- benchmarks:end --> once, found {count}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    results = load(args.results)
    if not results:
        parser.error(f"{args.results} holds no JSON: make bench writes it")
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(page, path.read_text(encoding="utf-8"), results), encoding="utf-8")
    draw(results, ROOT / "docs" / "pictures")
    print(headline(results))


if __name__ == "__main__":
    main()
