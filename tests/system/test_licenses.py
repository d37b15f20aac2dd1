"""docs/licenses.md names every package that users install, with the license that its own metadata states."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.system.lowest_bounds import project

ROOT = Path(__file__).parents[2]
EXTRAS = ("parquet", "evaluate", "export", "generate")
KINDS = {"PSF": "Python Software Foundation", "BSD-3-Clause": "BSD", "Apache-2.0": "Apache", "MIT-CMU": "MIT-CMU"}


def listed():
    """package -> its license, of the page."""
    rows = re.findall(r"^\| ([\w-]+) \| ([^|]+) \|", (ROOT / "docs" / "licenses.md").read_text(), re.MULTILINE)
    return dict(rows[1:])


def test_every_dependency_is_listed():
    extras = project()["optional-dependencies"]
    wanted = [*project()["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]
    assert {Requirement(line).name for line in wanted} | {"pybind11"} == set(listed())


@pytest.mark.parametrize("package, license", listed().items())
def test_a_license_is_what_the_package_says(package, license):
    found = metadata.metadata(package)
    said = " ".join(
        [*found.get_all("License-Expression", []), *found.get_all("License", []), *found.get_all("Classifier", [])]
    )
    word = license.split()[0].partition("-based")[0]
    assert KINDS.get(word, word) in said
