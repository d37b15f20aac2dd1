"""The op tests find real faults of the CPU kernels: each mutant below must fail them (make mutants)."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from tests.support.mutants import Mutant

ROOT = Path(__file__).resolve().parents[3]
KERNELS = "csrc/kernels/cpu"
TESTS = (
    "tests/ops/test_nearest_safe.py",
    "tests/ops/test_losses.py",
    "tests/ops/test_info_nce.py",
    "tests/ops/test_neighbor_hinge.py",
    "tests/ops/test_every_backend.py",
)
SCREEN, QUANTIZE, PRODUCT = "isa/screen.cpp", "isa/quantize.cpp", "isa/product.cpp"
SEARCH, LIST, SMALL, PACK = "nearest_safe.cpp", "candidates.h", "small_bank.cpp", "packed_bank.cpp"
RETARGET, ROW, NCE = "isa/retarget.cpp", "isa/preservation.cpp", "info_nce.cpp"
HINGE = "neighbor_hinge.cpp"
ERROR = "splat(term.error[m]) * load(row.norm + at)"
LONGEST = "std::sqrt(double{square}) * (1 + slack())"

MUTANTS = [
    # nearest_safe, int8
    Mutant(
        "no error of the query in the bound",
        SCREEN,
        "splat(term.shift[m]) * load(row.mean_dot + at) +",
        ERROR,
        "splat(0.0f)",
    ),
    Mutant(
        "no error of the rows in the bound", SCREEN, "", "splat(term.norm[m]) * load(row.error + at)", "splat(0.0f)"
    ),
    Mutant("no share of the mean", SCREEN, "", "splat(term.shift[m]) * load(row.mean_dot + at)", "splat(0.0f)"),
    Mutant("rows past the end of a panel", SCREEN, "if (", "rows < kPanelRows", "false"),
    Mutant(
        "last query of a group unseen",
        SCREEN,
        "return static_cast<int>(",
        "left < kGroupSize ? left : kGroupSize",
        "left < kGroupSize ? left : kGroupSize - 1",
    ),
    Mutant("lower bound too high", SCREEN, "hit->lower = static_cast<float>(", "score - room", "score + room"),
    Mutant("error of a row forgotten", QUANTIZE, "term.error[r] =", "__builtin_sqrtf(square) * (1 + slack)", "0.0f"),
    Mutant("bias of a query", QUANTIZE, "terms->bias[slot] =", "-128 * sum", "-127 * sum"),
    Mutant("mean part of a score", QUANTIZE, "terms->base[slot] =", "query_at.mean_dot", "0.0"),
    Mutant("a bound of -infinity drops its row", SCREEN, "mask |= mask_not_less(", "or_nan", "bound"),
    Mutant("header of a packed bank unread", PACK, "header.count == count &&", "header.dim == dim", "true"),
    Mutant("threshold of another query", SEARCH, "const float theirs = shared[", "first_ + q", "0"),
    Mutant(
        "threshold as a score",
        SEARCH,
        "thresholds_[q] =",
        "static_cast<float>(scaled - std::abs(scaled) * kSpacing)",
        "score",
    ),
    Mutant(
        "zero query searched",
        SEARCH,
        "int64_t slot,\n                 Worker& worker) {\n  if (",
        "block.norms[query] == 0",
        "false",
    ),
    Mutant("ties to the higher index", LIST, "", "a.row < b.row", "a.row > b.row"),
    Mutant("threshold of fewer rows", LIST, "raise_threshold(", "slab_[k_ - 1].lower", "slab_[0].lower"),
    Mutant("front runners not rescored", LIST, "lowest = std::min(lowest,", "slab_[i].lower", "slab_[i].upper + 1e-3f"),
    Mutant("candidates after the first unscored", LIST, "if (!c.exact())", "c.upper = c.lower = score(c.row);"),
    # nearest_safe, fp32
    Mutant(
        "no bound around fp32 screening",
        SCREEN,
        "norms[r] =",
        "(__builtin_sqrtf(norms[r]) * (1 + args.slack) + floor) * (args.slack + kUnitQuerySlack) + floor * floor",
        "0.0f",
    ),
    Mutant("no bound around fp32 products", SCREEN, "const double reach = least -", "2 * error", "0.0 * error"),
    Mutant("fewer rows than k reached", SCREEN, "(", "total >= k ? low : high", "total >= k - 1 ? low : high"),
    Mutant("longest row unknown", SMALL, "return", LONGEST, "0 * square"),
    Mutant("overflow unseen", SMALL, "if (all_exact_ ||", "!(reach < kOverflow)", "false"),
    Mutant(
        "order of equal scores",
        SMALL,
        "uint64_t{bits} << 32 |",
        "~static_cast<uint32_t>(row)",
        "static_cast<uint32_t>(row)",
    ),
    Mutant(
        "rows not transposed",
        PRODUCT,
        "transpose_four(rows, j, scale, panel +",
        "j * kPanelRows",
        "j * kPanelRows ^ 32",
    ),
    Mutant("end of a row skipped", SCREEN, "for (int64_t j = 0;", "i + j < dim", "i + j + 1 < dim"),
    # retarget_loss
    Mutant("targets exchanged", RETARGET, "v_s +=", "v * s_v", "v * s_t"),
    Mutant(
        "own unsafe counterpart exchanged",
        RETARGET,
        "row.away_text = args.current_negative ? row.image :",
        "at(args.frozen_image, i)",
        "at(args.frozen_text, i)",
    ),
    Mutant("no margin", RETARGET, "softplus(args.beta * (away - other +", "args.margin", "0.0f"),
    Mutant("no projection", RETARGET, "", "-along * inverse * outer", "0.0f"),
    Mutant("slope of softplus", RETARGET, "*slope =", "(x > 0 ? 1 : e)", "1.0f"),
    Mutant("second neighbor unread", RETARGET, "load(rows +", "neighbors[j] * bank.dim", "neighbors[0] * bank.dim"),
    Mutant("extreme rows not rescaled", RETARGET, "return", "!(square >= 1e-28f && square <= 1e30f)", "false"),
    # preservation_loss
    Mutant("old sum not rescaled", ROW, "*sum_seen > 0 ? *sum_seen *", "__builtin_expf(before - best)", "1.0f"),
    Mutant("diagonal kept", ROW, "push * (get(mixed + i) -", "2 * get(paired + i)", "get(paired + i)"),
    Mutant(
        "gradient not projected", ROW, "out + i, (direction(whole, i) -", "projection * load(unit + i)", "splat(0.0f)"
    ),
    Mutant("denormal exponential", ROW, "return", "x < -87.0f ? Floats{} : p * power", "p * power"),
    Mutant(
        "softmax of rows only",
        ROW,
        "exponential(x - row_largest[r] - row_log[r]) +",
        "exponential(x - largest - log)",
        "splat(0.0f)",
    ),
    # info_nce, whose kernels preservation_loss runs too
    Mutant("tiles after the first overwrite", NCE, "multiply_add(tile.get(), count, c, width,", "c > 0", "false"),
    Mutant("diagonal of another tile", NCE, "= tile[", "(j - begin) * width + j - c", "j - begin"),
    Mutant("mask ignored", NCE, "args.mask != nullptr &&", "args.mask[j] == 0", "false"),
    Mutant(
        "negatives of other processes not masked",
        NCE,
        "if (",
        "args.mask != nullptr",
        "args.mask != nullptr && j >= args.first && j < args.first + args.x.rows",
    ),
    Mutant("first counted without the mask", NCE, "", "++diagonal_;", "diagonal_ = args.first;"),
    Mutant("rows numbered in the batch", NCE, "rows_.push_back(", "j - args.first", "j % args.x.rows"),
    Mutant("counterpart of the first process", NCE, "y_.get() + (", "diagonal_ + first + i", "first + i"),
    Mutant("sum of a stripe lost", NCE, "total += sum[", "s * n + j", "0 * n + j"),
    Mutant("column sum of another maximum", NCE, "", "std::exp(static_cast<double>(largest[s * n + j]) - top)", "1.0"),
    Mutant("stale log-sum of the rows", NCE, "log[i] =", "sums.rows[args_.x.rows + rows_[first + i]]", "0.0f"),
    Mutant("stale log-sum of the columns", NCE, "log.push_back(", "args.sums.columns[all + j]", "0.0f"),
    Mutant(
        "rows and columns exchanged",
        NCE,
        "largest[i] =",
        "sums.rows[rows_[first + i]]",
        "sums.columns[rows_[first + i]]",
    ),
    Mutant("mean over the rows of one process", NCE, "args.nce_weight * root_ /", "columns()", "rows_.size()"),
    Mutant("loss over the rows of one process", NCE, "std::max<int64_t>(", "columns()", "int64_t(rows_.size())"),
    Mutant("rows that do not count keep what they had", NCE, "", "n < all", "false"),
    Mutant("kept logits of another stripe", NCE, "? tile.get() : sums.logits +", "first * n", "0 * n"),
    Mutant("negative scale", NCE, "", "std::copysign(root_, args_.logit_scale)", "root_"),
    # neighbor_hinge
    Mutant(
        "open at exactly zero",
        HINGE,
        "if (",
        "!(2 * double{scores[j]} + args.margin > 0)",
        "2 * double{scores[j]} + args.margin < 0",
    ),
    Mutant("hinge without its margin", HINGE, "!(2 * double{scores[j]} +", "args.margin", "0.0"),
    Mutant("margin not in the value", HINGE, "(along + slope[dim]) +", "args.margin", "0.0"),
    Mutant("score not doubled", HINGE, "!(2 *", "double{scores[j]}", "double{scores[j] / 2}"),
    Mutant("limit of a query lost", HINGE, "share * (along +", "slope[dim]", "0.0f"),
    Mutant("another row's neighbors", HINGE, "args.indices +", "i * args.found", "(i == 0 ? 0 : i - 1) * args.found"),
    Mutant(
        "share counted twice", HINGE, "static_cast<float>(share *", "args.row_weights[i]", "args.row_weights[i] / 2"
    ),
    Mutant("loss without the weights", HINGE, "partial[b] +=", "args.row_weights[i] * value", "value"),
    Mutant("mean over the open hinges", HINGE, "kRoot2 / static_cast<double>(", "args.k", "open"),
    Mutant("slope of the last row kept", HINGE, "", "std::fill_n(slope, dim + 1, 0.0f);"),
]


def mutated(kernels: Path) -> dict[str, str]:
    """The files of `kernels` that mutants change, with all of them in."""
    sources = {mutant.file: (kernels / mutant.file).read_text() for mutant in MUTANTS}
    for number, mutant in enumerate(MUTANTS):
        sources[mutant.file] = mutant.rewrite(sources[mutant.file], number, "::saferclip::mutant")
    return sources


def build_copy() -> Path:
    """A copy of the project in build/mutants whose native module holds every mutant, all of them off."""
    tree = ROOT / "build" / "mutants"
    for part in ("csrc", "saferclip_fast", "tests"):
        shutil.rmtree(tree / part, ignore_errors=True)
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for part in ("CMakeLists.txt", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy2(ROOT / part, tree)
    for name, source in mutated(tree / KERNELS).items():
        (tree / KERNELS / name).write_text(source)
    environment = {
        **os.environ,
        "SAFERCLIP_FAST_CUDA": "0",
        "CMAKE_ARGS": "-DSAFERCLIP_CPU_OPTIMIZE=-O1",
        "CXXFLAGS": f"-include {shlex.quote(str(Path(__file__).with_name('mutant.h')))}",
    }
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, env=environment, check=True)
    return tree


def run_tests(tree: Path, number: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS]
    settings = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "SAFERCLIP_MUTANT": str(number)}
    return subprocess.run(command, cwd=tree, env={**os.environ, **settings}, capture_output=True, text=True)


def main() -> int:
    tree = build_copy()
    plain = run_tests(tree, -1)
    assert plain.returncode == 0, f"the tests fail without a fault:\n{plain.stdout[-4000:]}{plain.stderr[-4000:]}"
    survivors = []
    for number, mutant in enumerate(tqdm(MUTANTS, desc="mutants")):
        done = run_tests(tree, number)
        failed = re.findall(r"FAILED (\S+)", done.stdout)
        tqdm.write(f"{mutant.name}: {failed[0] if failed else f'exit status {done.returncode}'}")
        if done.returncode == 0:
            survivors.append(mutant.name)
    print(f"{len(MUTANTS) - len(survivors)} of {len(MUTANTS)} found; not found: {survivors}")
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main())
