"""The triton backend behind the public functions: autograd, opcheck, torch.compile, failures and fallback."""

import logging

import pytest
import torch

import saferclip_fast as sf
from saferclip_fast.ops import choice
from saferclip_fast.ops.triton import nearest_safe

from .device import DEVICE
from .test_losses import embeddings, retarget_arguments

OPS = torch.ops.saferclip_fast


@pytest.fixture
def batch():
    text, image, frozen_text, frozen_image = embeddings(5, 16, torch.float32)
    bank = sf.SafeBank(*embeddings(30, 16, torch.float32, seed=3)[:2])
    return text.requires_grad_(), image.requires_grad_(), frozen_text, frozen_image, bank


def step(text, image, frozen_text, frozen_image, bank, backend):
    redirect = sf.retarget_loss(text, image, frozen_text, frozen_image, bank, k=2, backend=backend)
    return redirect.loss + sf.preservation_loss(text, image, frozen_text, frozen_image, backend=backend).loss


def test_a_step_as_on_the_reference(batch):
    assert sf.backends()["triton"].usable
    for got, expected in zip(
        torch.autograd.grad(step(*batch, "triton"), batch[:2]),
        torch.autograd.grad(step(*batch, "reference"), batch[:2]),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_compiled_step(batch):
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(*batch, "triton"), batch[:2])
    got = torch.autograd.grad(compiled(*batch, "triton"), batch[:2])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_opcheck(batch):
    text, image, frozen_text, frozen_image, bank = batch
    torch.library.opcheck(OPS.nearest_safe_triton.default, (frozen_text, bank.text, 2))
    torch.library.opcheck(OPS.retarget_loss_triton.default, retarget_arguments([*batch[:4]]))
    torch.library.opcheck(
        OPS.preservation_loss_triton.default, (text, image, frozen_text, frozen_image, [1.0, 1.0, 1.0, 1.0], 10.0, True)
    )


def test_a_failure_names_the_backend_and_falls_back_only_where_allowed(batch, monkeypatch, caplog):
    def fails(*arguments):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(nearest_safe, "nearest_safe", fails)
    query, bank = batch[2], batch[4]
    with pytest.raises(sf.BackendError, match=r"'triton' failed to run nearest_safe.*out of resources"):
        sf.nearest_safe(query, bank, backend="triton")
    with sf.use_backend("triton"), pytest.raises(sf.BackendError, match="SAFERCLIP_FAST_FALLBACK=1"):
        sf.nearest_safe(query, bank)
    with sf.use_backend("triton", fallback=True), caplog.at_level(logging.WARNING, "saferclip_fast"):
        found = sf.nearest_safe(query, bank)
        with pytest.raises(sf.BackendError):  # a backend that the call names is not replaced
            sf.nearest_safe(query, bank, backend="triton")
        assert ("nearest_safe", "triton") in choice._FAILED
    assert torch.equal(found.indices, sf.nearest_safe(query, bank, backend="reference").indices)
    assert "falling back" in caplog.text


def test_an_argument_error_stays_what_it_is(batch):
    with pytest.raises(ValueError, match="at most 256"):
        sf.nearest_safe(
            batch[2], torch.nn.functional.normalize(torch.randn(300, 16, device=DEVICE), dim=-1), 257, backend="triton"
        )


def test_no_grid_is_wider_than_a_gpu_takes(monkeypatch):
    """CUDA's second and third dimensions end at 65,535 blocks: k over 60 takes 16 queries a block."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **options: None

    for name in ("prepare", "screen", "decide", "search_again", "merge_again"):
        monkeypatch.setattr(nearest_safe, f"{name}_kernel", Kernel())
    nearest_safe.nearest_safe(torch.empty(1_100_000, 1), torch.empty(70, 1), 61)
    assert len(grids) == 10 and all(size < 65_536 for grid in grids for size in grid[1:])


def test_a_single_configuration_is_not_timed(monkeypatch):
    """Triton before 3.8 asks for its time, which a graph capture does not survive."""
    tuner = nearest_safe.screen_kernel
    monkeypatch.setattr(tuner, "_do_bench", lambda *arguments, **options: pytest.fail("timed"))
    constants = {"BLOCK_ROWS": 16, "KEEP": 8}
    tuner.nargs = {"columns": torch.empty(1, 64)}
    single = tuner.prune_configs(constants)
    assert len(single) == 1
    assert tuner._bench(config=single[0], **constants) == [0.0, 0.0, 0.0]
