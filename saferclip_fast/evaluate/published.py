"""The published tables, and the user's own copies of their data: read and checked before torch is imported."""

from __future__ import annotations

import difflib
import functools
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..config import ConfigError
from ..data.errors import DataError
from ..data.places import check_place
from .places import check_images

FIGURES = Path(__file__).with_name("published.json")
READING = ("root", "unsafe_root", "unsafe_image", "columns", "text_only", "allow_absolute")  # of data.*, for one set
CLIP_BENCHMARK = "clip_benchmark:"
TableData = str | os.PathLike | Mapping[str, Any] | None


class DataSet(NamedTuple):
    """A data set of a published table."""

    title: str
    kind: str  # "quadruplets", "images" without labels, or "labeled" images
    where: str  # to be had
    rows: int | None = None  # in the paper, where we know
    classes: int | None = None  # of labeled images


class Row(NamedTuple):
    """A figure of a published table, in percent."""

    label: str
    needs: tuple[str, ...]  # data sets
    metric: str  # SET/METRIC of retrieval on the quadruplets SET, or METRIC
    wanted: str | None
    published: Mapping[str, float]  # by column; one that is not there is not known to us


class Table(NamedTuple):
    """A published table."""

    name: str
    title: str
    cited: str
    model: str  # architecture of the published models, as open_clip's names begin
    columns: tuple[str, ...]  # the published models
    differs: tuple[str, ...]  # where our protocol may differ
    rows: tuple[Row, ...]

    @property
    def needs(self) -> tuple[str, ...]:
        """The data sets of all rows, each once."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.needs))


@functools.cache
def data_sets() -> dict[str, DataSet]:
    """Every data set that a table needs, by its name in the table data."""
    found = {}
    for name, entry in _figures()["sets"].items():
        where = f"{CLIP_BENCHMARK}{name},root=FOLDER, a set of clip_benchmark, or class folders"
        found[name] = DataSet(**{"where": where} | entry)
    return found


@functools.cache
def tables() -> dict[str, Table]:
    """Every published table by its name."""
    found, differences = {}, _figures()["differences"]
    for name, entry in _figures()["tables"].items():
        rows = tuple(Row(**row | {"needs": tuple(row["needs"])}) for row in entry["rows"])
        told = {"columns": tuple(entry["columns"]), "differs": tuple(differences[key] for key in entry["differs"])}
        found[name] = Table(name, **entry | told | {"rows": rows})
    return found


def table_named(name: str) -> Table:
    """Raises ConfigError, with the names that there are, for another one."""
    if name not in tables():
        raise ConfigError(f"no table {name!r}, there are {', '.join(tables())}")
    return tables()[name]


def listing() -> str:
    """The tables and what each needs, as text."""
    return "\n".join(
        f"{name:22}{table.title}\n{'':22}needs {', '.join(table.needs)}" for name, table in tables().items()
    )


def read_table_data(given: TableData) -> dict[str, dict[str, Any]]:
    """Data set -> {"source": ..., and options of READING}, from a YAML file or a mapping.

    Raises ConfigError, naming the entry, for what is no data set, no source or no option.
    """
    values, place = (given, "table_data") if isinstance(given, Mapping) else _read_yaml(given)
    found = {}
    for name, value in values.items():
        if name not in data_sets():
            raise ConfigError(f"{place}: no data set {name!r}{_nearest(name, data_sets())}")
        entry = dict(value) if isinstance(value, Mapping) else {"source": value}
        known = ("source", *(READING if data_sets()[name].kind == "quadruplets" else ()))
        if unknown := [key for key in entry if key not in known]:
            raise ConfigError(f"{place}: {name} takes {', '.join(known)}, not {unknown[0]!r}")
        if not isinstance(entry.get("source"), str | os.PathLike) or not os.fspath(entry["source"]):
            raise ConfigError(f"{place}: {name} needs a source, {name}: PATH")
        for key in ("root", "unsafe_root"):
            if not isinstance(entry.get(key, ""), str | os.PathLike):
                raise ConfigError(f"{place}: {key} of {name} is a folder, not {entry[key]!r:.60}")
        entry["source"] = _without_download(os.fspath(entry["source"]))
        found[name] = entry
    return found


def missing_of(table: Table, given: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Data set of the table -> why it cannot be read, for those that are not named or not there.

    Raises ValueError for a source of a format that is none.
    """
    found = {}
    for name in table.needs:
        if name not in given:
            found[name] = "not named"
        elif reason := _not_there(data_sets()[name].kind, given[name]):
            found[name] = reason
    return found


def check_left(table: Table, missing: Mapping[str, str]) -> None:
    """Raises ConfigError, with what is missing and where it is to be had, where no row can be measured."""
    if not any(measurable(row, missing) for row in table.rows):
        raise ConfigError(
            f"nothing to measure for the table {table.name}: name its data in a YAML file (--table-data FILE), a line "
            f"SET: PATH each\n{missing_lines(missing)}"
        )


def measurable(row: Row, missing: Collection[str]) -> bool:
    """Whether everything that the row needs is there."""
    return not any(name in missing for name in row.needs)


def missing_lines(missing: Mapping[str, str]) -> str:
    """What is missing, why, and where it is to be had, a line each."""
    return "\n".join(f"  {name}: {reason}; {data_sets()[name].where}" for name, reason in missing.items())


def _figures() -> dict[str, Any]:
    return json.loads(FIGURES.read_text(encoding="utf-8"))


def _read_yaml(file: str | os.PathLike | None) -> tuple[Mapping[str, Any], str]:
    if file is None:
        return {}, ""
    try:
        found = _KeysOnce(Path(file).read_text(encoding="utf-8")).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{os.fspath(file)}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, Mapping):
        raise ConfigError(f"{os.fspath(file)}: expected lines SET: PATH, found {type(found).__name__}")
    return found, os.fspath(file)


class _KeysOnce(yaml.SafeLoader):
    """Safe YAML that refuses a key that is there twice, of which the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if doubled := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{doubled[0]} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _nearest(name: Any, known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(name), known, 1)
    return f", did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


def _without_download(source: str) -> str:
    """clip_benchmark would download what is not there."""
    fetches = source.startswith(CLIP_BENCHMARK) and "download=" not in source
    return f"{source},download=false" if fetches else source


def _not_there(kind: str, entry: Mapping[str, Any]) -> str:
    """Why the data set cannot be read, "" where everything that it names is there."""
    folders = [entry[key] for key in ("root", "unsafe_root") if entry.get(key)]
    if kind == "images":
        folders.append(entry["source"])
    if lost := [folder for folder in folders if not Path(folder).is_dir()]:
        return f"no such folder: {lost[0]}"
    try:
        if kind == "quadruplets":
            check_place(entry["source"], entry.get("root"))
        elif kind == "labeled":
            check_images(entry["source"])
    except DataError as error:
        return str(error)
    return ""
