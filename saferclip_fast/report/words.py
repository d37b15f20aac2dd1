"""The figures in plain words: what changed, by how much and how sure that is.

A verdict goes by the first 10 items, says where other ranks disagree, and knows chance and drift: verdicts.py says how.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..results import NO_UNSAFE_IMAGES as NO_UNSAFE_IMAGES
from ..results import PAGE, UNSAFE_FOUND, UNSAFE_RATE, at, cutoffs, in_first
from .verdicts import SLIGHT, Asker, at_chance, direction, faults, listed, overall, points

Estimate = Mapping[str, float]  # "value", "low", "high"

WANTED = {"falls": "should fall", "rises": "should rise", "stays": "should stay", None: ""}


@dataclass
class Statement:
    """One of the cards of the first screen."""

    topic: str
    verdict: str
    tone: str  # "good", "bad" or "even"
    sentences: list[str]


def number(unit: str, value: float, signed: bool = False) -> str:
    """A percentage of a "share", or the plain number of a "place", a "cosine" or what is 1 for the frozen model."""
    digits, scaled = {"share": (1, 100 * value), "place": (1, value)}.get(unit, (3, value))
    rounded = round(scaled, digits) + 0.0  # no "-0.0"
    sign = "+" if signed and rounded else ""
    return format(rounded, f"{sign}.{digits}f").replace("-", "−")


def percent(unit: str) -> str:
    """What to write behind `number`."""
    return "\N{NO-BREAK SPACE}%" if unit == "share" else ""


def interval(unit: str, estimate: Estimate, signed: bool = False) -> str:
    """Both ends as `number` writes them."""
    return f"{number(unit, estimate['low'], signed)} to {number(unit, estimate['high'], signed)}"


def beside(name: str, metrics: Mapping[str, Any], side: str) -> str:
    """The same metric at the other K ("@1 0.4, @5 1.0"); nothing for one that has none."""
    others = {k: metrics[other] for k, other in cutoffs(name, metrics).items() if other != name}
    shown = [f"@{k} {number(e['unit'], e[side]['value'], side == 'change')}" for k, e in others.items() if side in e]
    return ", ".join(shown)


def chance(entry: Mapping[str, Any]) -> str:
    """What a random order would give, for the line under a metric's name; nothing where there is no such figure."""
    if "chance" not in entry:
        return ""
    return f"by chance {number(entry['unit'], entry['chance'])}{percent(entry['unit'])}"


def verdict(entry: Mapping[str, Any]) -> tuple[str, str]:
    """One word on a metric's change, and its tone. Of a cosine 0.05 is as five points."""
    if "change" not in entry or entry["wanted"] is None:
        return "", "even"
    moved = direction(entry)
    if moved == 0:
        return "no clear change", "even"
    if entry["wanted"] == "stays":
        lost = moved < 0 and points(entry) >= SLIGHT
        return ("higher" if moved > 0 else "lower"), ("bad" if lost else "even")
    right = moved == (1 if entry["wanted"] == "rises" else -1)
    return ("better", "good") if right else ("worse", "bad")


_ASKED = ("unsafe captions", "an unsafe image"), ("unsafe images", "an unsafe caption")
_SAFE_ASKED = ("safe captions", "an unsafe image"), ("safe images", "an unsafe caption")
# topic -> its metrics, each with its sentence: who asks, and what they find
TOPICS: dict[str, dict[str, tuple[str, str]]] = {
    "Safety": dict(zip(map(at, UNSAFE_FOUND), (*_ASKED, *_SAFE_ASKED), strict=True)),
    "Redirection": {
        at("unsafe_text_finds_right_image"): ("unsafe captions", "a right safe image"),
        at("unsafe_image_finds_right_text"): ("unsafe images", "a right safe caption"),
    },
    "Usefulness": {
        at("S-V.text_to_image"): ("safe captions", "a right image"),
        at("S-V.image_to_text"): ("safe images", "a right caption"),
        "zero_shot": ("labeled pictures", "their class"),
    },
}


def statements(evaluation: Mapping[str, Any]) -> list[Statement]:
    """The first screen's cards: safety, redirection, usefulness, as far as they were measured; what decided a verdict
    comes first in its card."""
    metrics = evaluation["metrics"]
    confidence = evaluation.get("settings", {}).get("confidence", 0.95)
    sets = sum(name.startswith("zero_shot.") for name in metrics)
    broken = faults(metrics, {name: f"{who} that find {what}" for name, (who, what) in TOPICS["Usefulness"].items()})
    cards = []
    for topic, asked in {**TOPICS, "Safety": TOPICS["Safety"] | _real_images(metrics)}.items():
        known = [name for name in asked if name in metrics]
        if known:
            known.sort(key=lambda name: -_largest(name, metrics))
            sentences = [_sentence(name, metrics, *asked[name], confidence, sets) for name in known]
            askers = [Asker(asked[name][0], _ranks(name, metrics)) for name in known]
            said = broken if topic == "Usefulness" else []
            text, tone, note = overall(topic, askers, broken)
            cards.append(Statement(topic, text, tone, [*said, *filter(None, [note]), *sentences]))
    return cards


def _ranks(name: str, metrics: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """K -> the metric there; under PAGE the only one where it has no K."""
    return {k: metrics[other] for k, other in (cutoffs(name, metrics) or {PAGE: name}).items()}


def _largest(name: str, metrics: Mapping[str, Any]) -> float:
    """The largest clear change at any K, in percentage points."""
    return max(points(entry) if direction(entry) else 0.0 for entry in _ranks(name, metrics).values())


def _real_images(metrics: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """images.SET.unsafe_caption of every set, with their sentences."""
    names = (name.removeprefix("images.") for name in metrics if name.startswith("images."))
    return {f"images.{n}": (f"{n.removesuffix('.unsafe_caption')} images", "an unsafe caption") for n in names}


def _sentence(name: str, metrics: Mapping[str, Any], who: str, what: str, confidence: float, sets: int) -> str:
    """Of 1,000 unsafe captions, 998 found an unsafe image in their first 10 before; 18 do now (95 % interval 11 to 27).

    sets: of zero-shot classification; a mean over several is no count of pictures and said in percent.
    """
    entry = metrics[name]
    unit, samples, tuned = entry["unit"], entry["samples"], entry["tuned"]
    average = name == "zero_shot" and sets > 1
    of = f"Of the {who} of {sets} sets, on average" if average else f"Of {samples:,} {who},"
    where = f" in their first {PAGE}" if name.endswith(f"@{PAGE}") else " first" if name.startswith("images.") else ""

    def count(share: float) -> str:
        return number(unit, share) + percent(unit) if average else f"{share * samples:,.0f}"

    range_ = f"({100 * confidence:g}\N{NO-BREAK SPACE}% interval {count(tuned['low'])} to {count(tuned['high'])})"
    if "frozen" not in entry:
        return f"{of} {count(tuned['value'])} find {what}{where} {range_}.{_more(name, metrics)}"
    sentence = f"{of} {count(entry['frozen']['value'])} found {what}{where} before; "
    sentence += f"{count(tuned['value'])} do now {range_}."
    change = entry["change"]
    if change["low"] <= 0 <= change["high"]:
        low, high = (number(unit, change[end], True) for end in ("low", "high"))
        sentence += f" No clear change: somewhere between {low} and {high} percentage points."
    else:
        sentence += f" Change: {number(unit, change['value'], True)} percentage points"
        sentence += f" ({interval(unit, change, True)})."
    return sentence + _more(name, metrics)


def _more(name: str, metrics: Mapping[str, Any]) -> str:
    """Sentences on the other K, and on chance."""
    entry, said = metrics[name], ""
    if others := beside(name, metrics, "tuned"):
        before = beside(name, metrics, "frozen")
        said += f" In percent at other K: {others}" + (f" (before {before})." if before else ".")
    sides = [word for side, word in (("frozen", "before"), ("tuned", "now")) if at_chance(entry, side)]
    if sides:
        when = f" {listed(sides)}" if "frozen" in entry else ""
        said += f" That is chance{when}: a random order gives {number(entry['unit'], entry['chance'])}"
        said += f"{percent(entry['unit'])}."
    return said


def lead(cards: Sequence[Statement]) -> str:
    """The verdicts in one line."""
    return "; ".join(f"{card.verdict[0].lower()}{card.verdict[1:]}" for card in cards).capitalize() + "."


def added(restored: Mapping[str, Any]) -> str:
    """What a restoration changed."""
    layers = restored["layers"]
    count = sum(layer["changed"] for layer in layers)
    return f"{restored['add']:.2f} of the safe change added to {count} of {len(layers)} changed weights."


def restored_figure(name: str) -> str:
    """A figure of restore.json in words."""
    unsafe = f"anything unsafe {in_first(PAGE)}, mean of 4 searches"
    return unsafe if name == at(UNSAFE_RATE) else f"zero-shot accuracy, {name.removeprefix('zero_shot.')}"
