"""Which backend a call takes: named, forced, or from the user's and the package's tables."""

import json
import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import saferclip_fast as sf
from saferclip_fast.ops import choice
from saferclip_fast.tune import tuning as tune
from saferclip_fast.tune.__main__ import main


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No user's table, and nothing remembered from or for other tests."""
    monkeypatch.setenv("SAFERCLIP_FAST_CACHE", str(tmp_path))
    choice.table.cache_clear()
    choice._forget()
    yield
    choice.table.cache_clear()
    choice._forget()


def chosen(work=100, backend="auto", dtype=torch.float32):
    return choice.select("nearest_safe", backend, "cpu", dtype, work)._schema.name.split("::")[1]


def write_table(rows):
    common = {"op": "nearest_safe", "device": "cpu", "name": None, "dtype": None, "because": "a test"}
    choice.table_path().write_text(json.dumps([{**common, **row} for row in rows]))


def test_force_and_restore():
    before = chosen()
    with sf.use_backend("reference"):
        assert chosen() == "nearest_safe_reference"
        with sf.use_backend("auto"):
            assert chosen() == before
        assert chosen() == "nearest_safe_reference"
    assert chosen() == before


def test_what_a_forced_backend_cannot_take_goes_to_the_reference():
    with sf.use_backend("cuda"):
        assert chosen(dtype=torch.float64) == "nearest_safe_reference"
        if not sf.backends()["cuda"].usable:
            with pytest.raises(RuntimeError, match="'cuda' cannot run nearest_safe here"):
                chosen()


def test_what_a_backend_has_no_kernel_for_goes_to_another():
    x, y = torch.randn(2, 4, 8)
    expected = sf.info_nce(x, y)
    assert torch.equal(sf.info_nce(x, y, backend="cuda"), expected)
    with sf.use_backend("cuda"):
        assert torch.equal(sf.info_nce(x, y), expected)


def test_a_pass_that_failed_takes_both_passes_elsewhere(monkeypatch, caplog):
    """The second one reads what the first one kept."""
    if "info_nce_loss" not in sf.backends()["cpu"].ops:
        pytest.skip("needs the native module")

    def broken(*arguments):
        raise RuntimeError("broken on purpose")

    broken._schema = torch.ops.saferclip_fast.info_nce_loss.default._schema
    x, y = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    expected = torch.autograd.grad(sf.info_nce(x, y, logit_scale=5.0, backend="reference"), x)[0]
    monkeypatch.setitem(choice._KERNELS, ("info_nce_loss", "auto", x.device, x.dtype, 5), broken)
    monkeypatch.setattr(choice, "_fallback", True)
    with caplog.at_level(logging.WARNING, "saferclip_fast"):
        found = torch.autograd.grad(sf.info_nce(x, y, logit_scale=5.0), x)[0]
    assert "broken on purpose; falling back" in caplog.text
    assert list(choice._FAILED) == [("info_nce_sums", "cpu")]
    torch.testing.assert_close(found, expected)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"'gpu' is unknown.*triton"), sf.use_backend("gpu"):
        pass
    with pytest.raises(ValueError, match="'gpu' is unknown"):
        chosen(backend="gpu")


def test_the_environment_forces_a_whole_run():
    call = "choice.select('nearest_safe', 'auto', 'cpu', torch.float32)"
    code = f"import torch; from saferclip_fast.ops import choice; print({call})"
    environment = {**choice.os.environ, "SAFERCLIP_FAST_BACKEND": "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "nearest_safe_reference" in done.stdout


def test_the_users_table_comes_first_and_goes_by_work_and_dtype():
    default = chosen()
    write_table(
        [
            {"dtype": "float32", "below": 10, "order": ["cuda", "reference"]},
            {"name": "another chip", "order": ["reference"], "below": None},
        ]
    )
    choice.table.cache_clear()
    choice._forget()
    assert chosen(work=2**9) == "nearest_safe_reference"  # cuda is not usable for CPU tensors
    assert chosen(work=2**10) == default
    assert chosen(work=2**9, dtype=torch.bfloat16) == default


def test_a_table_that_cannot_be_read_is_reported(caplog):
    choice.table_path().write_text("{")
    with caplog.at_level(logging.WARNING, "saferclip_fast"):
        chosen()
    assert "saferclip_fast.tune" in caplog.text


def test_a_debug_line_and_backends_say_what_was_picked_and_why(caplog):
    with caplog.at_level(logging.DEBUG, "saferclip_fast"), sf.use_backend("reference"):
        for _ in range(2):  # remembered after the first
            sf.nearest_safe(torch.eye(10, dtype=torch.float16), torch.eye(10, dtype=torch.float16))
    assert [record.message for record in caplog.records] == [
        "nearest_safe on cpu float16, work < 2^7: forced -> reference"
    ]
    assert "nearest_safe on cpu float16, work < 2^7: forced" in sf.backends()["reference"].picked


def test_tune_writes_the_table_that_auto_follows(monkeypatch, capsys):
    monkeypatch.setattr(tune, "WIDTH", 16)
    monkeypatch.setattr(tune, "SEARCHES", ((1, 10), (4, 100)))
    monkeypatch.setattr(tune, "BATCHES", (2, 4))
    monkeypatch.setattr(tune, "seconds", lambda function, *rest: 1.0 if "reference" in function._schema.name else 2.0)
    main(["--device", "cpu", "--output", str(choice.table_path())])
    main(["--device", "cpu", "--output", str(choice.table_path())])  # replaces its own rows
    rows = json.loads(choice.table_path().read_text())
    assert len(rows) == 5 * 2 * 2 and rows[0]["order"][0] == "reference"
    assert [row["below"] for row in rows[:2]] == [(4 + 9) // 2, None]
    choice._forget()
    assert chosen() == "nearest_safe_reference"
    assert "written to" in capsys.readouterr().out


def test_tune_times_the_real_kernels(monkeypatch):
    monkeypatch.setattr(tune, "WIDTH", 16)
    monkeypatch.setattr(tune, "BATCHES", (3,))
    for op in ("retarget_loss", "preservation_loss", "info_nce_sums", "neighbor_hinge"):
        (row,) = tune.measure(op, "cpu", torch.float32, 1e-4)
        assert "reference" in row["order"] and row["because"].startswith("measured here")


def test_tune_searches_a_packed_bank_as_training_does(monkeypatch):
    monkeypatch.setattr(tune, "SEARCHES", ((2, 40),))
    ((_, (_, bank, _, packed)),) = tune.cases("nearest_safe", "cpu", torch.float32)
    assert packed.equal(torch.ops.saferclip_fast.pack_bank(bank))


def test_work_beyond_int64_is_fine():
    assert chosen(work=2**80) == chosen()


def test_traced_calls_follow_the_forced_backend():
    query, bank = torch.randn(3, 8), F.normalize(torch.randn(20, 8), dim=-1)
    compiled = torch.compile(lambda q: sf.nearest_safe(q, bank, 2).indices, fullgraph=True, backend="aot_eager")
    expected = compiled(query)
    sf.backends()
    with sf.use_backend("reference"):
        choice.PICKED.clear()
        assert torch.equal(compiled(query), expected)
        assert any("forced" in line for line in sf.backends()["reference"].picked)
