"""A guard's figures as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def table(figures: Mapping[str, Any]) -> str:
    """A line for each modality, and the reliability curve below."""
    test = figures["data"]["test"]
    lines = [
        f"reported on {test['rows']} rows: {test['source']}",
        f"{'':5}  {'area under ROC, 95 % interval':29}  {'ECE':5}  at P = 0.5: found  false alarms  guard",
    ]
    for name, entry in figures["modalities"].items():
        area = "{value:.4f} [{low:.4f}, {high:.4f}]".format(**entry["auroc"])
        found, alarms = entry["at_half"]["found"], entry["at_half"]["false_alarms"]
        kind = f"{entry['hidden']} hidden units" if entry["hidden"] else "logistic regression"
        lines.append(f"{name:5}  {area:29}  {entry['ece']:.3f}  {found:18.1%}  {alarms:12.1%}  {kind}")
    lines.append("\nreliability: P(unsafe) -> unsafe share (items)")
    for name, entry in figures["modalities"].items():
        parts = [f"{p['predicted']:.2f} -> {p['observed']:.2f} ({p['samples']})" for p in entry["reliability"]]
        lines.append(f"{name:5}  " + ", ".join(parts))
    return "\n".join(lines)
