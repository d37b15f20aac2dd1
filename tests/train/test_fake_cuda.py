"""Data -> models -> objective on tensors that say they are on a GPU, without one: a mix-up of devices is an error here.

FakeTensorMode runs no kernel, only what decides shapes, types and devices. A bank that is exchanged or mapped
(objective.bank) reads row numbers back from the device, which fake tensors do not have: tested on the CPU.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from saferclip_fast import SafeBank
from saferclip_fast.config import load_config
from saferclip_fast.data import collate, open_quadruplets
from saferclip_fast.data.quadruplets import QuadrupletEmbeddings
from saferclip_fast.embeddings import embed_batch
from saferclip_fast.models import ClipModel, load_clip
from saferclip_fast.ops import Neighbors, preservation_loss
from saferclip_fast.train import Trainer
from saferclip_fast.train.prepare import Split, build_objective
from saferclip_fast.train.step import embed_micro_batches

pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")  # autocast's
CUDA = torch.device("cuda", 0)
ROWS, WIDTH, BANK = 6, 64, 21

MIXED = "data.train=scenes:n=6,size=32,mixed=0.5"
ALL_UNSAFE = "data.train=scenes:n=6,size=32"


def on_cuda(clip, mode):
    """The model with fake weights on the GPU."""
    with mode:
        for module in clip.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(
                        torch.empty(p.shape, dtype=p.dtype, device=CUDA), p.requires_grad
                    )
            for name, b in module._buffers.items():
                if b is not None:
                    module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=CUDA)
    return clip


def fake(mode, value):
    return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value


def loss_on_cuda(config, weights):
    """The objective's output for a real batch, as the training loop computes it."""
    clip = load_clip("ViT-tiny-8-32", str(weights))
    if config.model.tuning == "lora":
        clip.add_lora(4, dropout=0.1)
    else:
        clip.unfreeze()
    dataset = open_quadruplets(config.data.train, transform=clip.preprocess)
    batch = collate(clip.tokenizer)([dataset[i] for i in range(ROWS)])
    mode = FakeTensorMode()
    on_cuda(clip, mode).train()
    with mode:
        batch = {name: fake(mode, value) for name, value in batch.items()}
        micro = config.train.micro_batch_size
        if micro:
            current = embed_micro_batches(clip, batch, micro, config.train.precision)
        else:
            current = embed_batch(clip, batch, config.train.precision)
        bank = SafeBank.from_unit(*torch.empty(2, BANK, WIDTH, device=CUDA), {})
        k = config.objective.k
        known = Neighbors(torch.empty(ROWS, k), torch.zeros(ROWS, k, dtype=torch.int64))
        split = Split(
            samples=None,
            frozen=QuadrupletEmbeddings(*torch.empty(4, ROWS, WIDTH)),  # the cache, on the CPU
            bank=bank,
            neighbors=known if config.objective.neighbors == "offline" else None,
            mixed="mixed" in config.data.train,
        )
        run = SimpleNamespace(config=config, device=CUDA, objective=build_objective(config))
        run.objective.attach(bank)
        return Trainer.loss(run, current, batch, split), current


@pytest.mark.parametrize(("neighbors", "data"), [("offline", ALL_UNSAFE), ("in_step", MIXED)])
@pytest.mark.parametrize(
    "objective",
    [
        ("objective.name=saferclip",),
        ("objective.name=saferclip", "objective.k=4", "objective.negative=frozen"),
        ("objective.name=saferclip", "objective.weights.nce_text=0", "objective.weights.nce_image=0"),
        ("objective.preset=paper",),
        ("objective.name=safeclip",),
        ("objective.name=safeclip", "objective.targets=nearest"),
        ("objective.name=shieldclip",),
    ],
)
def test_every_objective_stays_on_the_gpu(weights, objective, neighbors, data):
    config = load_config(None, [*objective, data, f"objective.neighbors={neighbors}", "objective.backend=reference"])
    out, current = loss_on_cuda(config, weights)
    assert out.loss.device == CUDA and out.loss.shape == () and out.loss.requires_grad
    assert all(term.device == CUDA and term.shape == () for term in out.terms.values())
    assert all(x.device == CUDA and x.shape == (ROWS, WIDTH) for x in current)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("micro", [0, 4])
def test_every_way_to_embed_stays_on_the_gpu(weights, monkeypatch, tuning, precision, micro):
    monkeypatch.setattr("saferclip_fast.train.step.pack_rng", lambda device: {})  # reads the GPU's generator
    words = [ALL_UNSAFE, f"model.tuning={tuning}", f"train.precision={precision}", f"train.micro_batch_size={micro}"]
    given = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    forward, fed = ClipModel.forward, []

    def autocasted(*arguments):  # autocast does nothing where torch sees no GPU
        return tuple(x.to(given) for x in forward(*arguments))

    def watched(*rows, **options):
        fed.extend(x.dtype for x in rows)
        return preservation_loss(*rows, **options)

    monkeypatch.setattr(ClipModel, "forward", autocasted)
    monkeypatch.setattr("saferclip_fast.objectives.common.preservation_loss", watched)
    out, current = loss_on_cuda(load_config(None, [*words, "objective.backend=reference"]), weights)
    assert out.loss.device == CUDA and out.loss.dtype == torch.float32
    assert all(x.device == CUDA and x.dtype == given for x in current)
    assert fed == [given] * 4  # text, image and their frozen selves: one type, or the kernels multiply in float32


@pytest.mark.parametrize("left_behind", ["frozen_of", "neighbors_of"])
def test_a_mix_up_of_devices_is_an_error(weights, monkeypatch, left_behind):
    stays = {"frozen_of": lambda self, *_: self.frozen, "neighbors_of": lambda self, *_: self.neighbors}
    monkeypatch.setattr(Split, left_behind, stays[left_behind])
    with pytest.raises(ValueError, match="is on cpu, the rows on cuda:0; move one with"):
        loss_on_cuda(load_config(None, [ALL_UNSAFE, "objective.backend=reference"]), weights)
