"""A run's files for the report: read from its folder and checked; nothing is computed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..results import (
    DEEPEST,
    DIAL_FORMAT,
    EVALUATION_FORMAT,
    GATE_CURVE,
    GATE_CURVE_FORMAT,
    GUARD_FORMAT,
    RESTORE_FORMAT,
    dial_shape,
    evaluation_shape,
    gate_curve_shape,
    guard_shape,
    is_number,
    misfits,
    nesting,
    restore_shape,
)
from .place import check_evaluated

PARTS = ("safe_text", "safe_image", "unsafe_text", "unsafe_image")


@dataclass
class Run:
    """One run. All but the evaluation may be missing: None or empty."""

    name: str
    evaluation: dict[str, Any]
    dial: dict[str, Any] | None
    guard: dict[str, Any] | None
    gate: dict[str, Any] | None
    restored: dict[str, Any] | None
    log: list[dict[str, Any]]
    config: str | None
    embeddings: dict[str, dict[str, Tensor]]  # "frozen", "tuned" -> the four parts, each [rows, d]
    picture: bytes | None  # PNG of before and after; it shows unsafe images

    @property
    def sides(self) -> list[str]:
        return [side for side in ("frozen", "tuned") if side in self.evaluation["models"]]


def load_runs(folders: Sequence[str | Path] | Mapping[str, str | Path]) -> list[Run]:
    """Reads every folder, a run called by its name or by the folder's. Raises ValueError or OSError naming the file
    and what to do."""
    named = folders if isinstance(folders, Mapping) else dict(zip(_names(folders), folders, strict=True))
    return [_load(Path(folder), name) for name, folder in named.items()]


def _names(folders: Sequence[str | Path]) -> list[str]:
    """The folders' names, with as many of the folders above as it takes to tell them apart."""
    parts = [Path(folder).absolute().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise ValueError(f"a run is named twice: {', '.join(map(str, folders))}")
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _load(folder: Path, name: str) -> Run:
    check_evaluated(folder)
    evaluation = _json(folder / "evaluation.json", EVALUATION_FORMAT, evaluation_shape)
    dial, guard, gate, restored = (folder / f"{name}.json" for name in ("dial", "guard", GATE_CURVE, "restore"))
    config, picture = folder / "config.yaml", folder / "figure.png"
    return Run(
        name=name,
        evaluation=evaluation,
        dial=_json(dial, DIAL_FORMAT, dial_shape) if dial.is_file() else None,
        guard=_json(guard, GUARD_FORMAT, guard_shape) if guard.is_file() else None,
        gate=_json(gate, GATE_CURVE_FORMAT, gate_curve_shape) if gate.is_file() else None,
        restored=_json(restored, RESTORE_FORMAT, restore_shape) if restored.is_file() else None,
        log=_log(folder / "log.jsonl"),
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
        embeddings=_all_embeddings(folder, evaluation.get("embeddings", {})),
        picture=picture.read_bytes() if picture.is_file() else None,
    )


def _json(path: Path, form: str, shape: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if nesting(value) > DEEPEST:
            raise ValueError("nested too deeply")
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8
        raise ValueError(f"{path} is damaged ({error}): write it again") from error
    found = value.get("format") if isinstance(value, dict) else None
    if found != form:
        raise ValueError(f"{path} has format {found!r:.60}, and this version reads {form!r}: write it again")
    for misfit in misfits(value, shape(value), "it"):
        raise ValueError(f"{path} is damaged ({misfit}): write it again")
    return value


def _log(path: Path) -> list[dict[str, Any]]:
    """The log's lines; one that a crash tore is left out."""
    lines = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and is_number(value.get("step"), int):
            lines.append(value)
    return lines


def _all_embeddings(folder: Path, files: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """The embeddings of every side; none where a file is missing, since a map needs them all."""
    for file in files.values():
        if Path(file).name != file:
            raise ValueError(f"{folder / 'evaluation.json'} names embeddings outside its folder: {file!r}")
    if not all((folder / file).exists() for file in files.values()):
        return {}
    return {side: _embeddings(folder / file) for side, file in files.items()}


def _embeddings(path: Path) -> dict[str, Tensor]:
    try:
        rows = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path} ({error}): evaluate again") from error
    missing = [part for part in PARTS if part not in rows or rows[part].dim() != 2]
    if missing:
        raise ValueError(f"{path} holds no rows of {', '.join(missing)}: evaluate again")
    return {part: rows[part].float() for part in PARTS}
