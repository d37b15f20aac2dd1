"""The doctor: it says what is there, and notices a kernel that is wrong or fails."""

import time

import pytest
import torch

import saferclip_fast as sf
from saferclip_fast.doctor import checks
from saferclip_fast.doctor.__main__ import main
from saferclip_fast.doctor.checks import OPS, TOLERANCE, self_check
from saferclip_fast.doctor.machine import OPTIONAL, PACKAGES, describe


def test_all_is_well_here_and_every_usable_backend_was_asked(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    start = time.perf_counter()
    assert main([]) == 0
    assert time.perf_counter() - start < 10
    out = capsys.readouterr().out
    for name, row in sf.backends().items():
        assert row.detail in out
        if row.usable and name != "triton":
            assert all(f"{op:18} cpu   {name:10} error" in out for op in OPS)
    assert f"all {2 * len(OPS)} checks passed" in out or not sf.backends()["cpu"].usable


@pytest.mark.parametrize("row", [0, 100])
def test_a_kernel_that_is_wrong_in_one_number_is_noticed(row, capsys, monkeypatch):
    real = checks.nearest_safe

    def wrong(query, bank, k, *, backend):
        found = real(query, bank, k, backend=backend)
        if backend == "reference" and query.dtype == torch.float32:
            found.indices[row, k - 1] += 1
        return found

    monkeypatch.setattr(checks, "nearest_safe", wrong)
    monkeypatch.setattr(checks, "OPS", {"nearest_safe": OPS["nearest_safe"]})
    assert main([]) == 1
    assert "failed: nearest_safe on reference" in capsys.readouterr().out


@pytest.mark.parametrize("op", [op for op in OPS if op != "nearest_safe"])
def test_one_gradient_row_that_is_wrong_is_noticed(op, monkeypatch):
    """The smallest row of a gradient counts as much as the largest."""

    def wrong(x, backend):
        found = OPS[op][1](x, backend)
        if x.text.dtype == torch.float32:
            smallest = int(found[1].norm(dim=1).argmin())
            found[1][smallest] *= 1.01
        return found

    monkeypatch.setattr(checks, "OPS", {op: (OPS[op][0], wrong)})
    assert not any(check.passed for check in self_check())


def test_a_kernel_that_raises_is_named_with_its_words(monkeypatch, capsys):
    def broken(x, backend):
        if backend == "cpu":
            raise RuntimeError("no such instruction\nand more")
        return OPS["info_nce"][1](x, backend)

    if not sf.backends()["cpu"].usable:
        pytest.skip("the native module is not built")
    monkeypatch.setattr(checks, "OPS", {"info_nce": ("info_nce_sums", broken)})
    assert main([]) == 1
    assert "RuntimeError: no such instruction\n" in capsys.readouterr().out


def test_errors_are_those_of_float32():
    assert all(check.error < TOLERANCE / 10 for check in self_check())


def test_the_machine_is_described_in_lines():
    text = "\n".join(describe())
    assert sf.__version__ in text and torch.__version__.split("+")[0] in text and "GiB free" in text
    assert all(name in text for name in (*PACKAGES, *OPTIONAL)) and "\n\n" not in text
