"""The compile gates: every kernel and tuning configuration, for chips that are not here. See gates.py.

Compiled code is cached by content in build/, so only what changed is compiled again.
"""

import functools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.gpu import roofline

from .gates import HIP_SHARED_LIMITS, SHARED_LIMITS, TENSOR_CORES, WIDE_TILES

ROOT = Path(__file__).parents[3]
CUDA, HIP = list(SHARED_LIMITS), list(HIP_SHARED_LIMITS)


def compile_for(chips):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(ROOT / "build" / "triton-gates"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("gates.py")), *chips]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@functools.cache
def reports():
    """The reports of each chip, made by two processes."""
    found = {chip: [] for chip in CUDA + HIP}
    with ThreadPoolExecutor(2) as pool:
        for made in pool.map(compile_for, [(CUDA + HIP)[::2], (CUDA + HIP)[1::2]]):
            for report in made:
                found[report["chip"]].append(report)
    return found


def failing(chip, wrong):
    return [report for report in reports()[chip] if wrong(report)]


@pytest.mark.parametrize("chip", CUDA + HIP)
def test_every_variant_compiles(chip):
    assert not failing(chip, lambda report: "error" in report)
    assert len(reports()[chip]) >= (40 if chip in CUDA else 12)


@pytest.mark.parametrize("chip", CUDA)
def test_nothing_spills(chip):
    assert not failing(chip, lambda report: report["spilled"])


@pytest.mark.parametrize("chip", CUDA + HIP)
def test_shared_memory_is_within_the_chips(chip):
    limit = {**SHARED_LIMITS, **HIP_SHARED_LIMITS}[chip]
    assert not failing(chip, lambda report: report["shared"] > limit)


@pytest.mark.parametrize("chip", CUDA)
def test_the_chips_own_tensor_cores(chip):
    """wgmma and tcgen05 from 64 rows on; 16 rows are for mma.sync."""

    def wrong(report):
        small = "ROWS=16" in report["label"]
        wanted = {"": [], "ieee": [], "tensor": ["mma.sync" if small else TENSOR_CORES[chip]]}[report["product"]]
        return report["tensor"] != wanted

    assert not failing(chip, wrong)


@pytest.mark.parametrize("chip", HIP)
def test_matrix_cores_on_amd(chip):
    assert not failing(chip, lambda report: report["product"] == "tensor" and report["tensor"] != ["mfma"])


@pytest.mark.parametrize("chip", CUDA)
def test_tf32_only_in_the_screen(chip):
    """Its error is bounded there, and float64 decides."""
    assert not failing(chip, lambda report: report["tf32"] and "PRECISION=tf32" not in report["label"])
    assert failing(chip, lambda report: report["tf32"])


@pytest.mark.parametrize("chip", CUDA)
def test_a_logit_is_rounded_before_its_maximum_is_taken_off(chip):
    """A fused multiply-add would leave it unrounded beside a rounded maximum: 1 - softmax would be noise."""
    chunked = ("info_nce.sums_kernel", "info_nce.weights_kernel")
    assert not failing(chip, lambda report: report["fused"] and report["label"].startswith(chunked))
    assert failing(chip, lambda report: report["fused"])


@pytest.mark.parametrize("chip", CUDA)
def test_global_loads_are_16_bytes(chip):
    """Or TMA's. Kernels of another kind: they read terms, facts that lie 16 bytes apart, values of a few groups."""
    others = ("shared.sum_terms", "grouped_screen.largest", "grouped_screen.candidates")

    def wrong(report):
        return not (report["wide"] or report["bulk"]) and not report["label"].startswith(others)

    assert not failing(chip, wrong)


@pytest.mark.parametrize("chip", WIDE_TILES)
def test_the_screen_of_groups_reads_by_tma(chip):
    """And keeps what is below 1.2e-38: the place of a row may be all that an x of 0 consists of."""
    screens = failing(chip, lambda report: "screen_groups" in report["label"])
    assert len(screens) == 3
    assert all(report["bulk"] and not report["flushed"] for report in screens)
    assert not failing(chip, lambda report: report["bulk"] and "screen_groups" not in report["label"])


def test_the_screen_of_groups_costs_what_the_roofline_counts():
    """Unscaled, its code has one copy of what a tile costs beside the products; Triton 3.4 and 3.6 need 488 for 432."""
    screens = failing("sm_90", lambda report: "screen_groups" in report["label"])
    (count, _) = (report["instructions"] for report in screens if "SCALED=False" in report["label"])
    assert 2 * (count["FMNMX"] + count["LOP3"]) + 128 + 150 <= 1.1 * roofline.GROUP_SLOTS
    assert count["SHFL"] == 0  # a group lies in one thread
