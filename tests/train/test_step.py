"""Micro-batches and checkpointing give the gradient of the whole batch, dropout included, in less memory."""

import contextlib
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saferclip_fast import SafeBank
from saferclip_fast.data import SceneDataset, collate
from saferclip_fast.data.quadruplets import QuadrupletEmbeddings
from saferclip_fast.embeddings import embed_batch
from saferclip_fast.models import load_clip
from saferclip_fast.objectives import ObjectiveOutput, SaferClip
from saferclip_fast.ops import preservation_loss
from saferclip_fast.train.step import check_micro_batches, embed_micro_batches, forward_backward, micro_batches

ROWS = 13


@pytest.fixture
def adapted(weights):
    """adapted(dropout) -> a tiny model in training mode whose adapters are far from zero."""

    def make(dropout=0.0):
        torch.manual_seed(1)
        clip = load_clip("ViT-tiny-8-32", str(weights)).add_lora(rank=4, dropout=dropout)
        for name, p in clip.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
        return clip.train()

    return make


@pytest.fixture(scope="module")
def batch():
    data = SceneDataset(n=ROWS, seed=3)
    return collate(load_clip_tokenizer())([data[i] for i in range(ROWS)])


def load_clip_tokenizer():
    import open_clip

    return open_clip.get_tokenizer("ViT-B-32")


def loss(current: QuadrupletEmbeddings) -> ObjectiveOutput:
    """A loss in which every row meets every other one, and all four inputs take part."""
    generator = torch.Generator().manual_seed(5)
    anchors = [torch.randn(rows.shape, generator=generator) for rows in current]
    safe = preservation_loss(current[0], current[1], anchors[0], anchors[1], check=False)
    unsafe = preservation_loss(current[2], current[3], anchors[2], anchors[3], check=False)
    return ObjectiveOutput(safe.loss + 0.5 * unsafe.loss, safe.terms)


def gradients(clip):
    found = {name: p.grad.clone() for name, p in clip.named_parameters() if p.requires_grad}
    clip.zero_grad()
    return found


def assert_same(found, expected, tolerance):
    """Within `tolerance` of each gradient's norm."""
    for name, wanted in expected.items():
        assert (found[name] - wanted).norm() <= tolerance * wanted.norm(), name
        assert wanted.norm() > 0, name


@pytest.mark.parametrize("size", [1, 4, 5, 12])
def test_micro_batches_give_the_gradient_of_the_whole_batch(adapted, batch, size):
    clip = adapted()
    whole = forward_backward(clip, batch, loss)
    expected = gradients(clip)
    parts = forward_backward(clip, batch, loss, micro_batch_size=size)
    assert_same(gradients(clip), expected, 1e-5)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-5, atol=0)
    assert not parts.loss.requires_grad


@pytest.mark.parametrize("labels", [None, torch.arange(ROWS) % 3 > 0])
def test_micro_batches_give_the_gradient_of_saferclip(adapted, batch, labels):
    generator = torch.Generator().manual_seed(6)
    frozen = QuadrupletEmbeddings(*torch.randn(4, ROWS, 64, generator=generator))
    bank = SafeBank(*torch.randn(2, 20, 64, generator=generator))
    # so that their parts of the gradient are no small ones
    objective = SaferClip({"rank_guard": 100.0, "spread": 100.0, "neighbors": 1.0})
    objective.attach(bank)
    clip = adapted()

    def safer(current):
        return objective(current, frozen, bank, None, labels, labels)

    forward_backward(clip, batch, safer)
    expected = gradients(clip)
    forward_backward(clip, batch, safer, micro_batch_size=4)
    assert_same(gradients(clip), expected, 1e-5)


def test_dropout_is_the_same_in_both_passes(adapted, batch):
    clip = adapted(dropout=0.5)
    torch.manual_seed(9)
    rows = [embed_batch(clip, part) for part in micro_batches(batch, 4)]  # all graphs at once: the plain way
    loss(QuadrupletEmbeddings(*(torch.cat(column) for column in zip(*rows, strict=True)))).loss.backward()
    expected, random_after = gradients(clip), torch.rand(1)
    torch.manual_seed(9)
    forward_backward(clip, batch, loss, micro_batch_size=4)
    assert_same(gradients(clip), expected, 1e-5)
    assert torch.equal(torch.rand(1), random_after), "the next step draws other numbers"


def test_gradients_are_scaled_once(adapted, batch):
    clip = adapted()
    forward_backward(clip, batch, loss, micro_batch_size=4)
    expected = {name: 8 * g for name, g in gradients(clip).items()}
    forward_backward(clip, batch, loss, micro_batch_size=4, scale=lambda value: 8 * value)
    assert_same(gradients(clip), expected, 1e-6)


def test_gradients_are_synchronised_in_the_last_micro_batch_only(adapted, batch):
    clip, calls = adapted(), []

    @contextlib.contextmanager
    def no_sync():
        calls.append("no_sync")
        yield
        calls.append("end")

    def encode(images, tokens):
        calls.append(len(images) // 2)
        return clip(images, tokens)

    forward_backward(clip, batch, loss, micro_batch_size=5, encode=encode, no_sync=no_sync)
    assert calls == ["no_sync", 5, "end", "no_sync", 5, "end", 3]


@pytest.mark.parametrize("size", [0, 4])
def test_checkpointing_gives_the_same_gradient(adapted, batch, size):
    clip = adapted(dropout=0.5)
    torch.manual_seed(9)
    forward_backward(clip, batch, loss, micro_batch_size=size)
    expected = gradients(clip)
    plain = peak(clip, batch, size)
    clip.model.set_grad_checkpointing()
    torch.manual_seed(9)
    forward_backward(clip, batch, loss, micro_batch_size=size)
    assert_same(gradients(clip), expected, 1e-6)
    assert peak(clip, batch, size) < 0.8 * plain


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors made inside, at the moment when most of them were alive."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live and storage._cdata not in before:
                    self.live[storage._cdata] = weakref.ref(storage, self.freed(storage._cdata, storage.nbytes()))
                    self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return out

    def freed(self, key, size):
        def callback(reference):
            del self.live[key]
            self.now -= size

        return callback


def peak(clip, batch, size):
    with PeakMemory() as memory:
        forward_backward(clip, batch, loss, micro_batch_size=size)
        clip.zero_grad()
    return memory.peak


def repeated(batch, rows):
    """`batch` repeated to `rows`, images without memory of their own."""
    index = torch.arange(rows) % len(batch["index"])
    columns = {
        n: [c[i] for i in index] if isinstance(c, list) else c[index] for n, c in batch.items() if "image" not in n
    }
    images = {n: batch[n][:1].expand(rows, *batch[n].shape[1:]) for n in ("safe_image", "unsafe_image")}
    return columns | images


def test_memory_is_that_of_one_micro_batch(adapted, batch):
    """The limit of the requirement: 1.2 times a step of one micro-batch, plus the embeddings."""
    clip = adapted()
    small, large = repeated(batch, 16), repeated(batch, 128)
    embeddings = 4 * 128 * 64 * 4
    assert peak(clip, large, 16) <= 1.2 * peak(clip, small, 0) + embeddings
    assert peak(clip, large, 0) > 5 * peak(clip, small, 0), "the measure sees activations"


def test_micro_batches_are_trimmed_to_their_own_captions(batch):
    parts = micro_batches(batch, 4)
    assert [len(part["index"]) for part in parts] == [4, 4, 4, 1]
    for side in ("safe", "unsafe"):
        assert len({part[f"{side}_tokens"].shape[1] for part in parts}) > 1
        for part in parts:
            assert (part[f"{side}_tokens"][:, -1] != 0).any()
    assert torch.equal(torch.cat([part["safe_image"] for part in parts]), batch["safe_image"])


def test_embeddings_without_a_graph(adapted, batch):
    clip = adapted()
    found = embed_micro_batches(clip, batch, 4, "fp32")
    for rows, wanted in zip(found, embed_batch(clip, batch), strict=True):
        assert not rows.requires_grad
        torch.testing.assert_close(rows, wanted)


def test_batch_norm_in_training_refuses_micro_batches():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"without batch norm.*use model.tuning=lora"):
        check_micro_batches(model, 4, 8)
    check_micro_batches(model, 8, 8)
    check_micro_batches(model.requires_grad_(False), 4, 8)
