"""nearest_safe on every backend: exact against float64, whatever the values, shapes, dtypes and threads."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from saferclip_fast.ops import reference
from tests.ops.variants import cpu_variants, threads, variants

ALL = pytest.mark.parametrize("run", variants("nearest_safe"), ids=str)
CPU = pytest.mark.parametrize("run", cpu_variants(), ids=str)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_exact(query, bank, k, scores, indices):
    """The contract: scores within one float32 rounding of float64, order by (score, index), no better row left out."""
    rounding = 2.0**-23
    assert scores.shape == indices.shape == (len(query), k) and indices.dtype == torch.int64
    unit = normalize(query.double(), dim=1, eps=0.0).nan_to_num(0.0)
    truth = unit @ bank.double().T
    chosen = truth.gather(1, indices)
    noise = 2.0**-48 * bank.double().norm(dim=1).max() + 1e-44  # of the float64 sums themselves
    assert ((chosen - scores.double()).abs() <= rounding * chosen.abs() + noise).all()
    assert (indices.sort(1).values.diff(dim=1) > 0).all(), "an index twice"
    later, earlier = slice(1, None), slice(None, -1)
    tied = scores[:, later] == scores[:, earlier]
    assert (scores[:, later] <= scores[:, earlier]).all()
    assert (indices[:, later] > indices[:, earlier])[tied].all(), "a tie went to the higher index"
    left_out = truth.scatter(1, indices, -torch.inf).max(1).values
    worst = scores[:, -1].double()
    assert (left_out <= worst + rounding * worst.abs() + noise).all()


def scaled_rows(n, d):
    return randn(n, d) * torch.logspace(-12, 12, n).unsqueeze(1)


def one_huge(n, d):
    rows = randn(n, d) * 1e-3
    rows[torch.arange(n), torch.arange(n) % d] = torch.where(torch.arange(n) % 3 == 0, -5.0, 5.0)
    return rows


def clip_like(n, d):
    """A common direction, clusters, near-duplicates, a few large coordinates."""
    rows = randn(n // 16 + 1, d, seed=1)[torch.arange(n) % (n // 16 + 1)] + 0.3 * randn(n, d, seed=2)
    rows += 3 * randn(1, d, seed=3)
    rows[:, :3] += torch.tensor([20.0, -15.0, 10.0])
    rows[n // 2 :] = rows[: n - n // 2] + 1e-6 * randn(n - n // 2, d, seed=4)
    return normalize(rows, dim=1)


def near_ties(n, d):
    rows = randn(1, d).repeat(n, 1)
    rows[torch.arange(n), torch.arange(n) % d] *= 1 + 2.0**-23
    return rows


def with_zeros(n, d):
    rows = normalize(randn(n, d), dim=1)
    rows[::3] = 0
    return rows


def short_mean(n, d, tau=1e-38):
    """The rows that the mean is taken of cancel but for `tau`: a query's share of it leaves fp32's range."""
    rows = normalize(randn(n, d), dim=1)
    sampled = torch.arange(min(n, 256)) * n // min(n, 256)
    sampled = sampled[: len(sampled) // 2 * 2]
    rows[sampled[1::2]] = -rows[sampled[::2]]
    rows[sampled, 0] = tau
    return rows


def close_and_huge(n, d):
    """Rows an fp32 step or two apart: products with their mean leave fp32's range, their own squares do not."""
    rows = torch.full((n, d), 1e24)
    return torch.nextafter(rows, rows * torch.sign(randn(n, d)))


BANKS = {
    "gaussian": lambda n, d: normalize(randn(n, d), dim=1),
    "clip_like": clip_like,
    "one_huge_element": one_huge,
    "denormal": lambda n, d: randn(n, d) * 1e-39,
    "tiny": lambda n, d: randn(n, d) * 1e-24,
    "huge": lambda n, d: randn(n, d) * 1e17,
    "overflowing_squares": lambda n, d: randn(n, d) * 1e30,
    "all_equal": lambda n, d: randn(1, d).repeat(n, 1),
    "duplicates": lambda n, d: normalize(randn(5, d), dim=1).repeat(n // 5 + 1, 1)[:n],
    "near_ties": near_ties,
    "zero_rows": with_zeros,
    "all_zero": torch.zeros,
    "scaled_rows": scaled_rows,
    "same_magnitude": lambda n, d: torch.sign(randn(n, d)),
    "integers": lambda n, d: (randn(n, d) * 2).round(),
    "short_mean": short_mean,
    "shorter_mean": lambda n, d: short_mean(n, d, 1e-42),
    "close_and_huge": close_and_huge,
}


def queries(bank, count):
    """Random rows, bank rows as they are, one direction of the mean, a zero row, extreme scales."""
    q = randn(count, bank.shape[1], seed=9)
    half = count // 2
    q[:half] = bank[torch.arange(half) * len(bank) // max(half, 1)]
    q[-1] = 0
    q[-2] = bank.double().mean(0).float()
    q[-3] *= 1e-30
    q[-4] *= 1e30
    return q


@ALL
@pytest.mark.parametrize("name", BANKS)
def test_exact_on_adversarial_inputs(run, name):
    for n, d, k in ((700, 70, 9), (333, 129, 1)):
        bank = BANKS[name](n, d)
        query = queries(bank, 26)
        for packed in (None, run("pack_bank", bank)):
            assert_exact(query, bank, k, *run("nearest_safe", query, bank, k, packed))


# Few rows for each k: the fp32 path of small_bank.cpp. The last shape scores every row exactly.
SMALL = ((64, 70, 5), (250, 129, 1), (1000, 64, 100), (40, 33, 32))


@ALL
@pytest.mark.parametrize("name", BANKS)
def test_exact_in_small_banks_whatever_the_threads(run, name):
    for n, d, k in SMALL:
        bank = BANKS[name](n, d)
        for query in (queries(bank, 90), queries(bank, 26)[-5:]):  # many, and too few to transpose the bank
            results = []
            for count in (1, 2, 7):
                with threads(count):
                    results.append(run("nearest_safe", query, bank, k, None))
            assert_exact(query, bank, k, *results[0])
            assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


@ALL
@pytest.mark.parametrize("size", [1.0, 1e15])
def test_small_bank_finds_what_fp32_sums_hide(run, size):
    """Row 0 cancels its large products in float64 but not in float32: only a bound of that error keeps it."""
    d = 512
    query = torch.cat([torch.full((d // 2,), 1.0), torch.full((d // 2,), 2.0**-14)]).repeat(30, 1) * size
    bank = torch.zeros(200, d)
    bank[:, : d // 2] = randn(200, d // 2).sub_(0.5).sign_() * (1 + randn(200, d // 2, seed=1).abs())
    bank[:, d // 2 - 1] -= bank[:, : d // 2].double().sum(1).float()  # what is left is rounding
    bank[:, d // 2 :] = randn(200, d // 2, seed=2) * 1e-4
    for some in (query, query[:3]):
        assert_exact(some, bank, 7, *run("nearest_safe", some, bank, 7, None))


@ALL
def test_int8_rounding_that_hides_the_best_row(run):
    """The best row is rounded down everywhere, another one up in half: only a bound of that error keeps it."""
    n, d = 512, 65
    bank = torch.zeros(n, d)
    bank[::4] = randn(n // 4, d).clamp(-3, 3)
    bank[2::4] = -bank[::4]  # the mean that is taken off is zero
    bank[1, 1::2], bank[1, 2::2] = 10.51, 10.4
    bank[301, 1:] = 10.49
    bank[:, 0] = torch.where(torch.arange(n) % 4 == 0, 127.0, -127.0)  # the largest: steps of 1
    query = torch.ones(30, d)
    query[:, 0] = 0
    for packed in (None, run("pack_bank", bank)):
        assert (run("nearest_safe", query, bank, 1, packed)[1] == 301).all()


@ALL
def test_fp32_sums_that_overflow_on_their_way(run):
    """Row 9 is the best by far, but its sum leaves fp32's range in its first half."""
    bank = randn(64, 64) * 1e15
    bank[9, :32], bank[9, 32:] = -2e17, 3.2e17
    query = torch.full((20, 64), 1e21)  # the rows' own squares stay in range
    for some in (query, query[:1]):
        assert (run("nearest_safe", some, bank, 1, None)[1] == 9).all()


@ALL
@pytest.mark.parametrize("name", ["integers", "duplicates", "all_equal", "same_magnitude", "all_zero"])
def test_ties_are_bit_exact_where_every_sum_is(run, name):
    """Small integers: no rounding anywhere, so the result must equal the reference, ties included."""
    bank = (BANKS[name](900, 64) * 4).round()
    query = (randn(40, 64) * 3).round()
    expected = reference.nearest_safe(query, bank, 25)
    for packed in (None, run("pack_bank", bank)):
        scores, indices = run("nearest_safe", query, bank, 25, packed)
        assert torch.equal(indices, expected[1]) and torch.equal(scores, expected[0])


@ALL
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_exact_on_random_shapes_and_values(run, data):
    n = data.draw(st.integers(1, 400))
    d = data.draw(st.sampled_from([1, 2, 3, 4, 7, 15, 16, 17, 33, 64, 100]))
    q = data.draw(st.integers(1, 60))
    k = data.draw(st.integers(1, min(n, 256)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    bank_dtype = data.draw(st.sampled_from([torch.float32, dtype]))
    scale = 10.0 ** data.draw(st.integers(-3, 3))
    seed = data.draw(st.integers(0, 1000))
    levels = data.draw(st.sampled_from([0, 1, 3, 100]))  # few levels make many ties
    values = randn(n + q, d, seed=seed)
    if levels:
        values = (values * levels).round() / levels
    values[:: data.draw(st.integers(2, 50))] = values[0].clone()
    bank, query = values[:n].to(bank_dtype), (values[n:] * scale).to(dtype)
    packed = run("pack_bank", bank) if data.draw(st.booleans()) else None
    assert_exact(query, bank, k, *run("nearest_safe", query, bank, k, packed))


@ALL
def test_large_k_and_many_rows(run):
    """More rows than one chunk, k up to the native limit, so lists shrink many times."""
    bank = BANKS["clip_like"](5000, 40)
    query = queries(bank, 30)
    for k in (32, 256):
        for packed in (None, run("pack_bank", bank)):
            assert_exact(query, bank, k, *run("nearest_safe", query, bank, k, packed))


@ALL
@pytest.mark.parametrize("queries_count", [1, 30, 150])
def test_same_bits_whatever_the_threads(run, queries_count):
    bank = torch.cat([BANKS["clip_like"](3000, 64), BANKS["duplicates"](1000, 64)])
    query = randn(queries_count, 64, seed=3)
    for packed in (None, run("pack_bank", bank)):
        results = []
        for count in (1, 2, 7):
            with threads(count):
                results.append(run("nearest_safe", query, bank, 10, packed))
        assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


def test_every_instruction_set_gives_the_same_bits():
    bank, query = BANKS["clip_like"](2000, 77), randn(40, 77, seed=5)
    results = [run("nearest_safe", query, bank, 12, None) for run in cpu_variants()]
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


def test_a_packed_bank_is_the_same_bytes_on_any_thread_count_and_serves_every_instruction_set():
    bank, query = BANKS["clip_like"](1500, 50), randn(20, 50, seed=5)
    blobs = []
    for count in (1, 7):
        with threads(count):
            blobs.append(cpu_variants()[0]("pack_bank", bank))
    assert torch.equal(*blobs)
    for maker in cpu_variants():
        packed = maker("pack_bank", bank)
        for run in cpu_variants():
            assert_exact(query, bank, 5, *run("nearest_safe", query, bank, 5, packed))


@CPU
def test_packed_bank_in_a_read_only_map_at_an_odd_address(run, tmp_path):
    bank, query = BANKS["gaussian"](500, 48), randn(20, 48, seed=5)
    path = tmp_path / "packed"
    path.write_bytes(b"\0" * 13 + run("pack_bank", bank).numpy().tobytes())
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the map is not writable: that is the point
        packed = torch.from_numpy(np.frombuffer(mapped, dtype=np.uint8)[13:])
    assert packed.data_ptr() % 8 == 5
    assert_exact(query, bank, 5, *run("nearest_safe", query, bank, 5, packed))


def test_a_packed_bank_of_another_shape_is_refused():
    run = cpu_variants()[0]
    bank = BANKS["gaussian"](64, 32)
    packed = run("pack_bank", BANKS["gaussian"](64, 36))
    for wrong in (packed, packed[:-1], packed.zero_()[: len(run("pack_bank", bank))]):
        with pytest.raises(RuntimeError, match="packed is not pack_bank"):
            run("nearest_safe", bank, bank, 1, wrong)
    padded = BANKS["gaussian"](64, 36)  # another width, whose copy has as many bytes
    with pytest.raises(RuntimeError, match="packed is not pack_bank"):
        run("nearest_safe", padded, padded, 1, run("pack_bank", BANKS["gaussian"](64, 33)))


@ALL
@pytest.mark.parametrize("k", [0, 11, 257])
def test_k_out_of_range_is_refused(run, k):
    bank = randn(10 if k == 11 else 300, 8)
    with pytest.raises(RuntimeError, match=f"k={k}"):
        run("nearest_safe", bank, bank, k, None)


@ALL
def test_non_finite_inputs_end_and_stay_in_bounds(run):
    """check=False promises no meaning for such rows, but no crash, and the other queries stay exact."""
    bank, query = BANKS["gaussian"](600, 40), randn(30, 40, seed=2)
    query[3, 5], query[4, 6], query[5] = torch.nan, torch.inf, torch.nan
    scores, indices = run("nearest_safe", query, bank, 4, None)
    good = [i for i in range(30) if i not in (3, 4, 5)]
    assert_exact(query[good], bank, 4, scores[good], indices[good])
    assert ((indices >= 0) & (indices < 600)).all()
    bank[7, 7], bank[8] = torch.nan, torch.inf
    for packed in (None, run("pack_bank", bank)):
        _, indices = run("nearest_safe", query, bank, 4, packed)
        assert ((indices >= 0) & (indices < 600)).all()


def test_an_unknown_or_missing_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv("SAFERCLIP_FAST_ISA", "sse9")
    with pytest.raises(RuntimeError, match="SAFERCLIP_FAST_ISA=sse9 is unknown; use generic, avx2"):
        torch.ops.saferclip_fast.nearest_safe(randn(2, 4), randn(5, 4), 1)


def test_extra_memory_stays_small():
    """300 MB of bank, quantized on the way: the peak resident size may grow by 64 MiB at most."""
    script = (
        "import resource, torch, saferclip_fast.ops\n"
        "bank = torch.rand(100_000, 768); query = torch.rand(64, 768)\n"
        "op = torch.ops.saferclip_fast.nearest_safe\n"
        "op(query[:4], bank[:1000], 1)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "op(query, bank, 32)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ})
    assert int(out.stdout.split()[-1]) < 64 * 1024
