"""A fault put into native sources on purpose: all faults of a build are compiled in and switched on one at a time."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass
class Mutant:
    name: str
    file: str
    before: str  # text just before the place, to tell it from others; may be empty
    old: str
    new: str = ""  # empty: the statement is dropped

    def rewrite(self, source: str, number: int, switch: str) -> str:
        """`source` with `switch == number ? new : old` at the place; a statement is switched with if and else."""
        places = re.findall(re.escape(self.before) + r"\s*" + re.escape(self.old), source)
        assert len(places) == 1, f"{self.name}: {len(places)} places fit in {self.file}"
        head = places[0].removesuffix(self.old)
        on = f"{switch} == {number}"
        if self.old.endswith(";"):
            return source.replace(places[0], f"{head}{{ if ({on}) {{ {self.new} }} else {{ {self.old} }} }}")
        return source.replace(places[0], f"{head}({on} ? ({self.new}) : ({self.old}))")
