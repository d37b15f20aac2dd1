"""`make mutants` stays runnable: each mutant fits one place of the CPU kernels."""

import re

from .mutants import KERNELS, MUTANTS, ROOT, mutated


def test_every_mutant_has_its_place():
    sources = "".join(mutated(ROOT / KERNELS).values())
    assert {int(n) for n in re.findall(r"mutant == (\d+)", sources)} == set(range(len(MUTANTS)))
