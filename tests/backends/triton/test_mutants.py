"""The tests of InfoNCE, preservation and the search find real faults: each mutant of kernels and drivers fails.

A mutant is a copy of the module with one place changed, imported beside it. Its results are compared with the float64
reference by the rules of the other tests.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from saferclip_fast.ops import reference
from saferclip_fast.ops.triton import grouped_screen, info_nce, nearest_safe, preservation_loss
from tests.ops.test_info_nce import check, problem
from tests.support.error_rule import check_loss
from tests.support.mutants import Mutant

from .device import DEVICE
from .test_grouped_screen import one_sided, pack, take_groups
from .test_losses import WEIGHTS, embeddings
from .test_nearest_safe import assert_exact, rows, unit_rows

SUMS, LOSS, GROUPS = "info_nce.py", "preservation_loss.py", "grouped_screen.py"
MUTANTS = [
    Mutant("rows and columns swapped", SUMS, "inverse = ", "tl.load(inverse_y + column, mask=inside, other=0.0)",
           "tl.load(inverse_x + column, mask=inside, other=0.0)"),
    Mutant("mask ignored in the rows' sums", SUMS, "            if MASKED:\n                inside = ",
           "inside & (tl.load(mask + column, mask=inside, other=0) != 0)", "inside"),
    Mutant("mask ignored in the columns' sums", SUMS, "            if MASKED:\n                chosen = ",
           "chosen & (tl.load(mask + first + begin + row, mask=chosen, other=0) != 0)", "chosen"),
    Mutant("mask of the row ignored in the weights", SUMS, "", "(tl.load(mask + first + row) != 0)", "inside"),
    Mutant("lost partial sum of a row", SUMS, "", "total * tl.exp(largest - higher) +", ""),
    Mutant("lost partial sum of a column", SUMS, "", "totals * tl.exp(tops - above) +", ""),
    Mutant("column's sum not rescaled", SUMS, "", "totals * tl.exp(tops - above)", "totals"),
    Mutant("row's sum not rescaled", SUMS, "", "total * tl.exp(largest - higher)", "total"),
    Mutant("wrong first in the diagonal", SUMS, "", "column == first + begin + program", "column == begin + program"),
    Mutant("wrong first in the weights", SUMS, "", "own = column == first + row", "own = column == row"),
    Mutant("wrong first in the loss", SUMS, "", "own = slice(first, first + rows.shape[1])",
           "own = slice(0, rows.shape[1])"),
    Mutant("stale log-sum of the row", SUMS, "", "tl.store(rows + row_count + begin + program, tl.log(total))",
           "tl.store(rows + row_count + begin + program, total * 0)"),
    Mutant("last chunk of the sums dropped", SUMS, "", "for begin in range(0, row_count, step):",
           "for begin in range(0, max(row_count - step, 1), step):"),
    Mutant("last chunk of the gradient dropped", SUMS, "", "for begin in range(0, row_count, max(step, 1)):",
           "for begin in range(0, max(row_count - step, 1), max(step, 1)):"),
    Mutant("last row of a chunk left out of the columns", SUMS, "", "chosen = row < count", "chosen = row < count - 1"),
    # not one past the end: what it would read there is whatever the memory holds, once so small that nothing showed
    Mutant("last column unseen", SUMS, "column = left + tl.arange(0, COLUMNS)\n            ",
           "inside = column < column_count", "inside = column < column_count - 1"),
    Mutant("weights of the first chunk's rows", SUMS, "", "row = begin + program\n", "row = program\n"),
    Mutant("diagonal once, not twice", SUMS, "", "(of_column - one)", "of_column"),
    Mutant("no projection", SUMS, "", "through_norm(g, unit, tl.load(inverse + begin + row))",
           "g * tl.load(inverse + begin + row)"),
    Mutant("a row of the gradient halved", SUMS, "tl.store(row_pointer(grad, begin + row, width) + columns, ", "g,",
           "g * tl.where(begin + row == 0, 0.5, 1.0),"),
    Mutant("cosine of the wrong side", LOSS, "", "matrices[2 + side]\n", "matrices[3 - side]\n"),
    Mutant("a share counted twice", LOSS, "", "share = weight * of_gradient", "share = 2 * weight * of_gradient"),
    Mutant("frozen rows of the own side", LOSS, "x, y, own = matrices[side], ", "matrices[3 - side]",
           "matrices[2 + side]"),
    Mutant("second best forgotten", GROUPS, "", "tl.maximum(tl.minimum(a, b), tl.maximum(a_second, b_second))",
           "tl.maximum(a_second, b_second)"),
    Mutant("loser of the last comparison only", GROUPS, "return tl.maximum(a, b), ",
           "tl.maximum(tl.minimum(a, b), tl.maximum(a_second, b_second))", "tl.minimum(a, b)"),
    Mutant("a line without the screen's error", GROUPS, "", "kth - 2.001 * c", "kth"),
    Mutant("error of the copy forgotten", GROUPS, "", "+ farthest * (norm + of_query)", ""),
    Mutant("scale of the copy forgotten", GROUPS, "", "        if SCALED:", "        if SCALED and bank_rows < 0:"),
    Mutant("groups of the last tile unseen", GROUPS, "found = tl.load(best + row * groups + group, mask=",
           "group < groups", "group < whole"),
    Mutant("nothing beyond the end raises the line", GROUPS, "mask=", "group < whole, other", "group < groups, other"),
    Mutant("place in the group mistaken", GROUPS, "", "(column // LANES)[None, :]", "(column % members)[None, :]"),
    Mutant("rows of a group next to each other", GROUPS, "tl.store(to + slot, ", "first + place * LANES",
           "first + place"),
    Mutant("a group of several taken by its best", GROUPS, "several = ", "rest >= line", "rest >= line + 1e30"),
    Mutant("only one group of several", GROUPS, "", "open_groups & (group != chosen)", "open_groups & (group < 0)"),
    Mutant("full list cut off", GROUPS, "", "    # a bound this large",
           "    count = tl.minimum(count, CAPACITY)\n    # a bound"),
    Mutant("header not looked at", GROUPS, "", "tl.load(header) == MAGIC", "tl.load(header) == tl.load(header)"),
    Mutant("last row of the bank not scored", GROUPS, "inside = (slot < count)", " & (index < bank_rows)",
           " & (index < bank_rows - 1)"),
]  # fmt: skip


FOLDER = Path(info_nce.__file__).parent


def load(mutant: Mutant, folder: Path) -> ModuleType:
    """The module with the fault, as another module of the package."""
    source, place = (FOLDER / mutant.file).read_text(), mutant.before + mutant.old
    assert source.count(place) == 1, f"{mutant.name}: {source.count(place)} places fit in {mutant.file}"
    file = folder / f"{mutant.file.removesuffix('.py')}_{abs(hash(mutant.name))}.py"
    file.write_text(source.replace(place, mutant.before + mutant.new))
    spec = importlib.util.spec_from_file_location(f"saferclip_fast.ops.triton.{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def probe_info_nce(module: ModuleType) -> None:
    """Shares with a mask, of two chunks each and two blocks of columns, at a scale where every entry counts."""
    x, y, mask = (tensor.to(DEVICE) for tensor in problem(11, 5, torch.float32, seed=1))
    check((module.info_nce_sums, module.info_nce_loss), x, y, mask, 3.0, parts=2)


def probe_preservation(module: ModuleType) -> None:
    arguments = [*embeddings(5, 6, torch.float32), WEIGHTS, 10.0, True]
    check_loss("preservation_loss", list(module.preservation_loss(*arguments)), arguments)


def probe_groups(module: ModuleType) -> None:
    """Rows that the screen orders wrongly, in groups and alone, scores below 0, a full list, no header."""
    with pytest.MonkeyPatch.context() as patch:
        take_groups(patch)
        for name in ("screened", "screen_and_score"):
            patch.setattr(nearest_safe, name, getattr(module, name))
        assert_exact(*one_sided(), 1)
        base, bank = unit_rows(1, 32, seed=5), unit_rows(133, 32, seed=6)
        bank[3:110:9] = 0.5 * base + 1e-4 * bank[3:110:9]  # none shares a group with the next
        bank[40:88:8] = base + 1e-4 * bank[40:88:8]  # most of a group, and a part of another tile's
        bank[132] = base
        query = torch.cat([base + 0.01 * rows(2, 32, seed=7), -base])
        assert_exact(query, bank, 1)
        assert_exact(query[:2], bank, 6)
        bank = bank.abs()
        assert_exact(-bank[:1], bank * torch.linspace(1, 2, 133, device=DEVICE)[:, None], 1)
        equal = 600 if DEVICE == "cuda" else 140
        assert_exact(base, base.repeat(equal, 1) * torch.linspace(1, 1 + 1e-5, equal, device=DEVICE)[:, None], 2)
        packed = pack(bank.flip(0))
        packed[:8] = 0
        _, indices = nearest_safe.nearest_safe(base, bank, 2, packed)
        assert torch.equal(indices, reference.nearest_safe(base, bank, 2)[1])


PROBES = {SUMS: probe_info_nce, LOSS: probe_preservation, GROUPS: probe_groups}


def test_the_probes_pass_without_a_mutant():
    probe_info_nce(info_nce)
    probe_preservation(preservation_loss)
    probe_groups(grouped_screen)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_fails(mutant, tmp_path):
    module = load(mutant, tmp_path)
    with pytest.raises(AssertionError, match=r"."):
        PROBES[mutant.file](module)
