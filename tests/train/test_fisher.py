"""The start by Fisher information (lora.init=fisher): what it is, that it changes nothing, that runs go on."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import saferclip_fast.train.fisher
from saferclip_fast.config import ConfigError
from saferclip_fast.embeddings import embed_batch
from saferclip_fast.models import load_clip
from saferclip_fast.models.lora import START_A, START_B, lora_layers, start_tensors
from saferclip_fast.runtime.ranks import Ranks
from saferclip_fast.train import Trainer, train
from saferclip_fast.train.checkpoint import CheckpointError, read_checkpoint
from saferclip_fast.train.dry_run import dry_run
from saferclip_fast.train.fisher import important, squared_gradients, start_adapters, wanted_gradients
from saferclip_fast.train.prepare import prepare
from saferclip_fast.train.trial import set_trainable
from tests.train.conftest import final_weights, log_lines

BOTH = ("lora.dora=true", "lora.init=fisher")


def trainer(config):
    """Before its first step, without the start."""
    clip = load_clip(config.model.name, config.model.pretrained)
    data = prepare(config, clip)
    torch.manual_seed(config.seed)
    set_trainable(config, clip)
    return Trainer(config, clip, data)


def batches_of(own, chosen):
    return list(own.loader(own.data.train, [[index] for index in chosen]))


def test_squared_gradients_are_those_of_one_sample_at_a_time(tiny, tmp_path):
    """By brute force: the whole batch's loss, its rows constant but for one sample's unsafe, or safe, ones."""
    own = trainer(tiny(tmp_path, "lora.init=fisher", "lora.dropout=0"))
    split, clip = own.data.train, own.clip.eval()
    batches = batches_of(own, range(6))
    wanted = wanted_gradients(batches, split, own.loss, own.device, Ranks())
    found = squared_gradients(clip, batches, *wanted)
    names = ["visual.transformer.resblocks.0.mlp.c_fc", "transformer.resblocks.1.attn.in_proj"]
    layers = lora_layers(clip.model)
    weights = [layers[name].get_base_layer().weight.requires_grad_() for name in names]
    index = torch.cat([batch["index"] for batch in batches])
    batch = {"index": index}
    expected = {name: [torch.zeros_like(w), torch.zeros_like(w)] for name, w in zip(names, weights, strict=True)}
    for number, one in enumerate(batches):
        for part, columns in enumerate(((2, 3), (0, 1))):
            rows = [column.clone() for column in split.frozen_of(index, own.device)]
            current = embed_batch(clip, one, "fp32")
            for column in columns:
                rows[column] = torch.cat([rows[column][:number], current[column], rows[column][number + 1 :]])
            own.loss(type(current)(*rows), batch | labels(index), split).loss.backward()
            for name, weight in zip(names, weights, strict=True):
                expected[name][part] += weight.grad.square()
                weight.grad = None
    for name in names:
        assert expected[name][0].max() > 0 and expected[name][1].max() > 0
        for ours, brute in zip(found[name], expected[name], strict=True):
            assert (ours - brute).norm() <= 1e-3 * brute.norm()


def labels(index):
    return {name: torch.ones(len(index)) for name in ("unsafe_text_label", "unsafe_image_label")}


def test_rows_that_are_labeled_safe_count_as_safe(tiny, tmp_path, weights, cache):
    own = trainer(tiny(tmp_path, "lora.init=fisher"))
    split, batches = own.data.train, batches_of(own, range(4))
    split.mixed = True
    batches[1]["unsafe_text_label"] = torch.tensor([0])
    batches[2]["unsafe_image_label"] = torch.tensor([0.2])
    unsafe, safe = wanted_gradients(batches, split, own.loss, own.device, Ranks())
    assert not unsafe[:, :2].any() and not unsafe[1, 2].any() and not unsafe[2, 3].any()
    assert unsafe[1, 3].any() and unsafe[2, 2].any() and safe[:, :2].any(dim=-1).all()
    assert not safe[0, 2:].any() and not safe[1, 3].any(), "what is unsafe is asked nothing else"


def test_the_important_part_of_a_weight_is_its_equation():
    chance = np.random.default_rng(0)
    weight, unsafe, safe = chance.normal(size=(5, 7)), chance.random((5, 7)), chance.random((5, 7))
    expected = weight * np.sqrt(unsafe / (safe + safe.mean()))
    expected *= np.linalg.norm(weight) / np.linalg.norm(expected)
    found = important(*map(torch.from_numpy, (weight, unsafe, safe)))
    np.testing.assert_allclose(found, expected)
    alone = important(torch.from_numpy(weight), torch.from_numpy(unsafe), torch.zeros(5, 7, dtype=torch.float64))
    expected = weight * np.sqrt(unsafe)
    np.testing.assert_allclose(alone, expected * np.linalg.norm(weight) / np.linalg.norm(expected))


def test_every_layer_starts_at_its_important_part_and_the_model_as_it_was(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(saferclip_fast.train.fisher, "SAMPLES", 20)
    own = trainer(tiny(tmp_path, *BOTH, "lora.alpha=6"))
    clip, before = own.clip, own.clip.hash_weights()
    drawn = {name: tensor.clone() for name, tensor in start_tensors(clip.model).items()}
    state = torch.get_rng_state()
    start_adapters(own.state, own.data.train, own.loader, own.loss)
    assert torch.equal(torch.get_rng_state(), state) and not any(p.grad is not None for p in clip.parameters())
    assert clip.hash_weights() == before == clip.weights_hash
    assert {n for n, p in clip.model.named_parameters() if p.requires_grad} == set(own.state.trainable)
    found = start_tensors(clip.model)
    assert all(not torch.equal(tensor, drawn[name]) for name, tensor in found.items())
    chosen = torch.randperm(len(own.data.train.samples), generator=torch.Generator().manual_seed(0))[:20]
    batches = batches_of(own, chosen.sort().values.tolist())
    fisher = squared_gradients(clip, batches, *wanted_gradients(batches, own.data.train, own.loss, own.device, Ranks()))
    for name, layer in lora_layers(clip.model).items():
        whole = important(layer.get_base_layer().weight.detach(), *fisher[name])
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        product = 1.5 * getattr(layer, START_B) @ getattr(layer, START_A)  # alpha 6, rank 4
        torch.testing.assert_close(product, (u[:, :4] * s[:4]) @ v[:4], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run with everything that has a state of its own, every checkpoint of it kept."""
    run_dir = tmp_path_factory.mktemp("fisher") / "run"
    train(tiny(run_dir, *BOTH, "train.ema=0.9", "checkpoint.keep=100"))
    return run_dir


def test_the_same_options_give_the_same_bits(whole, tiny, tmp_path):
    train(tiny(tmp_path / "again", *BOTH, "train.ema=0.9", "checkpoint.keep=100"))
    assert final_weights(tmp_path / "again") == final_weights(whole)


def test_a_resumed_run_reads_its_start_and_ends_with_the_same_bits(whole, tiny, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "final")
    for path in sorted((run_dir / "checkpoints").iterdir())[3:]:
        path.unlink()
    monkeypatch.setattr(saferclip_fast.train.fisher, "squared_gradients", None)  # not computed again
    train(tiny(run_dir, *BOTH, "train.ema=0.9", "checkpoint.keep=100", "resume=auto"))
    assert final_weights(run_dir) == final_weights(whole)
    assert log_lines(run_dir) == log_lines(whole)


def test_checkpoints_hold_one_start_and_the_frozen_weights_stay(whole, weights):
    first, *_, last = (read_checkpoint(path).tensors for path in sorted((whole / "checkpoints").iterdir()))
    starts = [name for name in first if START_A in name or START_B in name]
    assert len(starts) == 2 * 16 and all(torch.equal(first[name], last[name]) for name in starts)
    assert any("magnitude" in name and not torch.equal(first[name], last[name]) for name in first)
    frozen, tuned = load_file(weights), load_file(whole / "final" / "open_clip_model.safetensors")
    moved = {name for name in frozen if not torch.equal(frozen[name], tuned[name])}
    assert moved and all("resblocks" in name and name.endswith("weight") for name in moved)


def test_another_start_is_another_run(whole, tiny):
    with pytest.raises(CheckpointError, match=r"lora\.init=zero \(was fisher\)"):
        train(tiny(whole, "lora.dora=true", "train.ema=0.9", "checkpoint.keep=100", "resume=auto"))


def test_micro_batches_give_the_same_run(tiny, tmp_path):
    words = (*BOTH, "lora.dropout=0", "train.epochs=2")
    for name, more in (("whole", ""), ("parts", "train.micro_batch_size=3")):
        train(tiny(tmp_path / name, *words, *filter(None, [more])))
    one, other = (load_file(tmp_path / name / "final" / "open_clip_model.safetensors") for name in ("whole", "parts"))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)


def test_text_alone_starts_the_text_encoder_alone(tiny, tmp_path):
    config = tiny(tmp_path, *BOTH)
    own = trainer(config)
    for name, parameter in own.clip.model.named_parameters():
        if name.startswith("visual."):
            parameter.requires_grad_(False)
    visual = [layer for name, layer in lora_layers(own.clip.model).items() if name.startswith("visual.")]
    start_adapters(own.state, own.data.train, own.loader, own.loss)
    assert not any(getattr(layer, START_B).any() for layer in visual)
    assert all(
        getattr(lora_layers(own.clip.model)[name.rpartition(".")[0]], START_B).any()
        for name in start_tensors(own.clip.model)
    )


def test_nothing_to_redirect_is_an_error(tiny, tmp_path):
    own = trainer(tiny(tmp_path, "lora.init=fisher", "objective.weights.rank_guard=0"))
    own.objective.weights |= dict.fromkeys(("uni_text", "uni_image", "cross_text", "cross_image"), 0.0)
    with pytest.raises(ConfigError, match=r"lora\.init=fisher: the objective asks nothing of the unsafe rows"):
        start_adapters(own.state, own.data.train, own.loader, own.loss)


def test_adapters_that_were_made_without_a_start_are_an_error(tiny, tmp_path):
    own = trainer(tiny(tmp_path, "lora.dora=true"))
    own.state.config.lora.init = "fisher"
    with pytest.raises(ConfigError, match=r"make them by add_lora\(\.\.\., start=True\)"):
        own.fit()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lora.dora=true", "model.tuning=full"], r"lora\.dora=true needs model\.tuning=lora"),
        (["lora.init=fisher", "model.tuning=full"], r"lora\.init=fisher needs model\.tuning=lora"),
        (["lora.init=fisher", "lora.alpha=0"], r"lora\.init=fisher needs lora\.alpha above 0"),
        (["lora.dora=true", "train.fsdp=true"], r"train\.fsdp=true needs model\.tuning=full"),
    ],
)
@pytest.mark.parametrize("command", [train, dry_run])
def test_options_that_do_not_go_together_are_named(tiny, tmp_path, words, said, command):
    with pytest.raises(ConfigError, match=said):
        command(tiny(tmp_path, *words))
