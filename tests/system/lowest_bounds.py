"""The lowest version that pyproject.toml allows of every dependency, as pip's requirements, for make lowest-bounds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
USED = ("parquet", "evaluate", "export")  # the extras that users have
TOOLS = ("pytest", "hypothesis", "pandas", "psutil", "datasets", "diffusers")  # of the extra dev: what the tests import


def lowest(requirements: Iterable[str]) -> list[str]:
    """`name==version` of each requirement that holds here, at its lower bound.

    Raises ValueError for one that has none.
    """
    found = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        bounds = [Version(part.version) for part in requirement.specifier if part.operator in (">=", "~=", "==")]
        if not bounds:
            raise ValueError(f"{requirement.name} has no lower bound in pyproject.toml: say the oldest that works")
        found.append(f"{requirement.name}=={max(bounds)}")
    return found


def project() -> dict:
    """What pyproject.toml says of the package."""
    return tomllib.loads(PROJECT.read_text())["project"]


def read() -> list[str]:
    """The lines for the dependencies, the extras of USED, and the TOOLS."""
    content = project()
    extras = content["optional-dependencies"]
    tools = [line for line in extras["dev"] if Requirement(line).name in TOOLS]
    return lowest([*content["dependencies"], *(line for name in USED for line in extras[name]), *tools])


if __name__ == "__main__":
    print("\n".join(read()))
