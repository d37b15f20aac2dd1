"""Parts of training that need a GPU: NCCL, pinned memory, autocast, loss scaling, no waiting. `make gpu-check` runs it.

Each runs on the CPU as well, so that the code of the tests themselves is known to work.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from saferclip_fast.config import load_config
from saferclip_fast.data import collate, decode_images, open_quadruplets
from saferclip_fast.embeddings import embed_batch
from saferclip_fast.models import load_clip
from saferclip_fast.models.attention import Attention
from saferclip_fast.objectives import ObjectiveOutput
from saferclip_fast.runtime.ranks import Ranks, join
from saferclip_fast.train import Trainer, train
from saferclip_fast.train.device import data_parallel, set_up_torch
from saferclip_fast.train.step import forward_backward
from tests.support.tiny import tiny
from tests.train.conftest import final_weights, log_lines

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
DEVICES = ["cpu", CUDA]


@pytest.fixture(autouse=True)
def torch_settings():
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)


def squares(current):
    return ObjectiveOutput(sum((rows**2).sum() for rows in current), {})


def batch_of(clip, dataset, device, workers=0):
    loader = DataLoader(
        dataset, len(dataset), collate_fn=collate(clip.tokenizer), num_workers=workers, pin_memory=device == "cuda"
    )
    return next(iter(loader))


@pytest.mark.parametrize("device", DEVICES)
def test_process_group_and_data_parallel(device, weights):
    """A world of one: the group carries tensors of both kinds, and DistributedDataParallel changes no gradient."""
    clip = load_clip("ViT-tiny-8-32", str(weights), device).add_lora(4).train()
    batch = batch_of(clip, open_quadruplets("scenes:n=9,size=32", transform=clip.preprocess), device)
    gradients = []
    join(dist.HashStore(), 0, 1)
    try:
        for where in {"cpu", device}:
            value = torch.arange(3.0, device=where)
            dist.all_reduce(value)
            assert value.tolist() == [0, 1, 2]
        Ranks(0, 2).give_up_after(1)
        for size in (0, 4):
            for parallel in (None, data_parallel(copy.deepcopy(clip), Ranks(0, 2))):
                model = clip if parallel is None else parallel.module
                no_sync = {} if parallel is None else {"no_sync": parallel.no_sync}
                forward_backward(model, batch, squares, micro_batch_size=size, encode=parallel, **no_sync)
                gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
                model.zero_grad()
    finally:
        dist.destroy_process_group()
    for found in gradients[1:]:
        assert (found - gradients[0]).norm() < 1e-5 * gradients[0].norm()


@pytest.mark.parametrize("device", DEVICES)
def test_decoded_images_through_pinned_memory(device, weights, tmp_path):
    clip = load_clip("ViT-tiny-8-32", str(weights), device)
    dataset = open_quadruplets("scenes:n=9,size=40", transform=clip.preprocess)
    expected = batch_of(clip, dataset, device)
    found = batch_of(clip, decode_images(dataset, tmp_path, progress=False), device, workers=1)
    assert torch.equal(found["safe_image"], expected["safe_image"])
    assert found["safe_image"].is_pinned() == (device == "cuda")
    for a, b in zip(embed_batch(clip, found), embed_batch(clip, expected), strict=True):
        assert a.device.type == device and torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_in_every_precision(device, precision, weights, tmp_path):
    """Autocast and GradScaler; a run that is resumed ends with the same bits."""
    words = (f"device={device}", f"train.precision={precision}", "threads=0", "train.tf32=false")
    train(tiny(tmp_path / "run", weights, tmp_path / "cache", *words))
    losses = [line["loss"] for line in log_lines(tmp_path / "run") if line["kind"] == "val"]
    assert losses[-1] < losses[0]
    (tmp_path / "run" / "checkpoints" / "step-0000000020.safetensors").unlink()
    before = final_weights(tmp_path / "run")
    train(tiny(tmp_path / "run", weights, tmp_path / "cache", "resume=auto", *words))
    assert final_weights(tmp_path / "run") == before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_repeats_its_bits(device, dtype):
    """train.deterministic: above 256 tokens the memory-efficient kernel splits the keys, and adds in any order."""
    set_up_torch(load_config(None, ["data.train=scenes:n=4", f"device={device}", "threads=0"]))
    packed = torch.nn.MultiheadAttention(64, 2, batch_first=True, device=device, dtype=dtype)
    attention, x = Attention(packed, causal=False), torch.randn(4, 300, 64, device=device, dtype=dtype)
    found = [
        torch.autograd.grad(attention(x, x, x)[0].float().square().sum(), packed.in_proj_weight)[0] for _ in range(9)
    ]
    assert all(torch.equal(found[0], again) for again in found[1:])


@pytest.mark.parametrize("device", DEVICES)
def test_steps_do_not_wait_for_the_device(device, weights, tmp_path, monkeypatch):
    step, counted = Trainer.step, []

    def watched(self, batch):
        counted.append(self.state.progress.step)
        if device == "cuda" and len(counted) > 1:  # the first one loads kernels
            torch.cuda.set_sync_debug_mode("error")
        try:
            step(self, batch)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "step", watched)
    words = (
        f"device={device}",
        "threads=0",
        "train.epochs=1",
        "log.every_steps=99",
        "data.train=scenes:n=96,mixed=0.5",
    )
    train(tiny(tmp_path / "run", weights, tmp_path / "cache", *words))
    assert counted == [0, 1, 2]
