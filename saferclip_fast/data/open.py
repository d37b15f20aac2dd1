"""One function that opens quadruplets of any format."""

from __future__ import annotations

from .images import Transform
from .quadruplets import QuadrupletDataset
from .scenes import SceneDataset

GENERATED = {"scenes": SceneDataset}


def open_quadruplets(source: str, *, transform: Transform | None = None) -> QuadrupletDataset:
    scheme, _, options = str(source).partition(":")
    return GENERATED[scheme](**parse_options(options), transform=transform)


def parse_options(text: str) -> dict[str, int | float | str | bool]:
    """Parse "name=value,name=value": values become int, float or bool where they read as such."""
    options: dict[str, int | float | str | bool] = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"expected name=value, got {item!r} in {text!r}")
        options[name.strip()] = _value(value.strip())
    return options


def _value(text: str) -> int | float | str | bool:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
