"""The loop: it learns, in every precision and mode, and says what is wrong when something is."""

import json
import math
import shutil
import traceback
import warnings
from dataclasses import asdict

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from saferclip_fast.config import ConfigError, OptimizerOptions, load_config
from saferclip_fast.models import load_clip
from saferclip_fast.runtime.precision import autocast, native_precision
from saferclip_fast.train import Trainer, train
from saferclip_fast.train.__main__ import main
from saferclip_fast.train.checkpoint import CheckpointError
from saferclip_fast.train.frozen import FrozenModelError
from saferclip_fast.train.optim import build_optimizer, check_all_used, learning_rate
from tests.train.conftest import final_weights, log_lines, validations


def test_training_redirects(tiny, tmp_path):
    only_redirect = [f"objective.weights.{n}_{m}=0" for n in ("cross", "cos", "nce") for m in ("text", "image")]
    only_redirect += ["objective.weights.rank_guard=0", "objective.k=1"]
    train(tiny(tmp_path, "train.epochs=8", "optimizer.lr=3e-3", "curriculum.enabled=false", *only_redirect))
    first, *_, last = [line for line in log_lines(tmp_path) if line["kind"] == "train"]
    assert last["uni_text"] < 0.5 * first["uni_text"] and last["loss"] < 0.7 * first["loss"]


def test_training_preserves(tiny, tmp_path):
    words = ("train.epochs=8", "optimizer.lr=3e-3", "curriculum.enabled=false", "objective.weights.rank_guard=0")
    train(tiny(tmp_path / "held", *words))
    train(tiny(tmp_path / "free", *words, "objective.weights.cos_text=0", "objective.weights.cos_image=0"))
    first, *_, last = validations(tmp_path / "held")
    free = validations(tmp_path / "free")[-1]
    assert last["loss"] < first["loss"]
    assert all(last[term] < 0.5 * free[term] for term in ("cos_text", "cos_image")), (last, free)


def test_run_folder(undisturbed, weights):
    files = {str(p.relative_to(undisturbed)) for p in undisturbed.rglob("*") if p.is_file()}
    assert files == {
        "config.yaml",
        "log.jsonl",
        "best.safetensors",
        "checkpoints/step-0000000018.safetensors",
        "checkpoints/step-0000000020.safetensors",
        "final/open_clip_model.safetensors",
        "final/open_clip_config.json",
        "final/frozen.json",
    }
    model = open_clip.create_model("ViT-tiny-8-32", pretrained=str(undisturbed / "final/open_clip_model.safetensors"))
    frozen = load_clip("ViT-tiny-8-32", str(weights)).exported_state_dict()
    moved = [n for n, t in model.state_dict().items() if not torch.equal(t, frozen[n])]
    assert len(moved) == 16 and all("resblocks" in n and n.endswith("weight") for n in moved), "LoRA's targets alone"


def test_curriculum_grows_over_three_epochs(undisturbed):
    steps = {line["epoch"]: line["step"] for line in validations(undisturbed)}
    # 86 training samples in batches of 8: a third, two thirds, all
    assert steps == {1: 29 // 8, 2: 29 // 8 + 58 // 8, 3: 29 // 8 + 58 // 8 + 86 // 8}


def test_search_in_the_step_gives_the_same_run(tiny, tmp_path, undisturbed):
    train(tiny(tmp_path, "objective.neighbors=in_step"))
    assert final_weights(tmp_path) == final_weights(undisturbed)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_on_the_cpu(tiny, tmp_path, undisturbed, precision):
    train(tiny(tmp_path, f"train.precision={precision}"))
    expected, found = validations(undisturbed)[-1], validations(tmp_path)[-1]
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.05)
    assert found["loss"] != expected["loss"], "it did run in another precision"


def test_checkpointing_changes_no_bit(tiny, tmp_path, undisturbed):
    train(tiny(tmp_path, "train.checkpointing=true"))
    assert final_weights(tmp_path) == final_weights(undisturbed)


def test_micro_batches_train_as_whole_batches_do(tiny, tmp_path):
    train(tiny(tmp_path / "whole", "lora.dropout=0", "train.epochs=2"))
    train(tiny(tmp_path / "parts", "lora.dropout=0", "train.epochs=2", "train.micro_batch_size=3"))
    for found, expected in zip(log_lines(tmp_path / "parts"), log_lines(tmp_path / "whole"), strict=True):
        assert found.pop("kind") == expected.pop("kind")
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


class NothingRead(TorchDispatchMode):
    """Fails where the host asks for a value or a count that only the device knows, which on a GPU waits for it."""

    READS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)
    ON_THE_CPU_ALONE = ("_scale_gradients", "_fused_adam")  # they look at the device first

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in self.READS:
            callers = [frame.name for frame in traceback.extract_stack()]
            assert set(callers) & set(self.ON_THE_CPU_ALONE), f"{function} waits for the device: {callers[-8:]}"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "words", [[], ["train.micro_batch_size=3"], ["objective.neighbors=in_step"], ["train.precision=fp16"]]
)
def test_steps_read_nothing_from_the_device_until_they_log(tiny, tmp_path, monkeypatch, words):
    step, watched_steps = Trainer.step, []

    def read(tensor):
        raise AssertionError("tolist waits for the device")

    def watched(self, batch):
        with monkeypatch.context() as patches, NothingRead():
            patches.setattr(torch.Tensor, "tolist", read)  # does not dispatch
            step(self, batch)
            watched_steps.append(self.state.progress.step)

    monkeypatch.setattr(Trainer, "step", watched)
    source = "data.train=scenes:n=96,size=32,mixed=0.5"
    train(tiny(tmp_path / "run", "train.epochs=1", "checkpoint.every_steps=99", "log.every_steps=99", source, *words))
    assert watched_steps == [1, 2, 3]
    with pytest.raises(AssertionError, match="waits for the device"):  # a step that logs
        train(tiny(tmp_path / "logs", "train.epochs=1", "log.every_steps=2", source, *words))
    assert watched_steps == [1, 2, 3, 1]


def test_decoded_images_train_to_the_same_bits(tiny, tmp_path, undisturbed):
    train(tiny(tmp_path, "data.decoded_cache=true", f"data.cache_dir={tmp_path / 'cache'}", "data.num_workers=1"))
    assert final_weights(tmp_path) == final_weights(undisturbed)
    assert len(list(tmp_path.glob("cache/decoded-*.safetensors"))) == 1


def test_full_tuning(tiny, tmp_path):
    train(tiny(tmp_path, "model.tuning=full", "optimizer.name=adamw", "optimizer.weight_decay=0.1"))
    train(tiny(tmp_path, "model.tuning=full", "optimizer.name=adamw", "optimizer.weight_decay=0.1", "resume=auto"))
    first, *_, last = validations(tmp_path)
    assert last["loss"] < first["loss"]


@pytest.mark.parametrize(("name", "shown"), [("safeclip", "text_nsfw="), ("shieldclip", "redirect=")])
@pytest.mark.parametrize("mixed", [0.0, 0.5])
def test_baselines_in_the_same_loop(tiny, tmp_path, capsys, name, shown, mixed):
    source = f"data.train=scenes:n=96,size=32,mixed={mixed}"
    train(tiny(tmp_path, source, f"objective.name={name}", "optimizer.lr=3e-3", "log.progress=true"))
    first, *_, last = validations(tmp_path)
    assert last["loss"] < first["loss"]
    assert shown in capsys.readouterr().err, "the progress bar shows the objective's own terms"


def test_mixed_pairs_and_several_neighbors(tiny, tmp_path):
    train(tiny(tmp_path, "data.train=scenes:n=96,size=32,mixed=0.5", "objective.k=3", "train.epochs=1"))
    assert {"kept_text", "kept_image"} <= set(validations(tmp_path)[0])


def test_validation_on_a_set_of_its_own(tiny, tmp_path, undisturbed):
    train(tiny(tmp_path, "data.val=scenes:n=16,size=32,split=test", "train.epochs=1"))
    (line,) = validations(tmp_path)
    assert line["step"] == 96 // 3 // 8, "nothing is held out of the training set"
    assert math.isfinite(line["loss"])


def test_no_validation(tiny, tmp_path):
    train(tiny(tmp_path, "data.val_fraction=0", "train.epochs=1"))
    assert validations(tmp_path) == [] and not (tmp_path / "best.safetensors").exists()
    assert final_weights(tmp_path)


def test_early_stopping_exports_the_best_weights(tiny, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 1.5, 0.1])
    monkeypatch.setattr(Trainer, "validate", lambda self, split: {"loss": next(losses)})
    trained = []
    save = Trainer.save
    monkeypatch.setattr(Trainer, "save", lambda self: (trained.append(self), save(self)))
    result = train(tiny(tmp_path, "validation.patience=2", "train.epochs=9"))
    assert (result.progress.epoch, result.progress.best_score, result.progress.stale) == (5, 1.0, 2)
    assert result.progress.best_step == validations(tmp_path)[1]["step"]
    best = trained[-1].state.trained_tensors()
    stored = load_best(tmp_path)
    assert all(torch.equal(best[n], t) for n, t in stored.items()), "exported from the best weights"


def test_early_stopping_on_recall(tiny, tmp_path, monkeypatch):
    recalls = iter([0.5, 0.9, 0.8, 0.7, 1.0])
    monkeypatch.setattr(Trainer, "validate", lambda self, split: {"loss": 1.0, "recall": next(recalls)})
    result = train(tiny(tmp_path, "validation.patience=2", "validation.metric=recall", "train.epochs=9"))
    assert (result.progress.epoch, result.progress.best_score, result.progress.stale) == (5, -0.9, 2)


@pytest.mark.parametrize("native", ["bf16", "fp32"])
def test_precision_auto_is_what_the_hardware_has(tiny, tmp_path, monkeypatch, native):
    monkeypatch.setattr("saferclip_fast.train.trainer.native_precision", lambda device: native)
    train(tiny(tmp_path / native, "train.precision=auto", "train.epochs=1"))
    assert load_config(tmp_path / native / "config.yaml").train.precision == native, "the run says what it used"


@pytest.mark.parametrize("native", ["bf16", "fp32"])
def test_auto_is_resolved_where_no_run_did_it(monkeypatch, native):
    """Trainer and embed_quadruplets may be called with a config that no train() has seen."""
    monkeypatch.setattr("saferclip_fast.runtime.precision.native_precision", lambda device: native)
    with autocast(torch.device("cpu"), "auto"):
        assert torch.is_autocast_enabled("cpu") == (native == "bf16")


def test_bf16_is_native_only_with_instructions_for_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert native_precision(cpu) == "fp32"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert native_precision(cpu) == "bf16"


def load_best(run_dir):
    return load_file(run_dir / "best.safetensors")


def test_tensorboard_events(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny(tmp_path, "log.tensorboard=true", "train.epochs=1"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [3]
    assert [e.step for e in events.Scalars("val/cross_image")] == [3]


def test_used_folder_needs_resume(tiny, undisturbed):
    with pytest.raises(CheckpointError, match=r"holds a run: pass resume=auto to go on with it, or choose another"):
        train(tiny(undisturbed))


def test_resume_refuses_another_run(tiny, undisturbed, tmp_path):
    with pytest.raises(CheckpointError, match=r"is from another run: optimizer\.lr=0\.5 \(was 0\.001\); use the old"):
        train(tiny(undisturbed, "resume=auto", "optimizer.lr=0.5"))
    with pytest.raises(CheckpointError, match=r"data\.train=.*data_hash=\w{12} \(was \w{12}\)"):
        train(tiny(undisturbed, "resume=auto", "data.train=scenes:n=96,size=32,seed=5"))


def test_resume_goes_by_what_weights_and_data_are_not_by_where_they_lie(tiny, weights, tmp_path):
    run_dir = tmp_path / "run"
    resumed = ("train.epochs=1", "resume=auto")
    train(tiny(run_dir, *resumed))
    before = final_weights(run_dir)
    moved, other = tmp_path / "moved.safetensors", tmp_path / "other.safetensors"
    shutil.copy(weights, moved)
    train(tiny(run_dir, *resumed, f"model.pretrained={moved}", "data.train=scenes:size=32,n=96"))
    assert final_weights(run_dir) == before
    tensors = load_file(weights)
    save_file(tensors | {"logit_scale": tensors["logit_scale"] + 1}, other)
    said = (
        rf"{run_dir} was tuned from weights \w{{12}}, and ViT-tiny-8-32, {other} gives \w{{12}}; what differs: weights"
    )
    with pytest.raises(FrozenModelError, match=said):
        train(tiny(run_dir, *resumed, f"model.pretrained={other}"))


def test_resume_refuses_other_preprocessing(tiny, weights, tmp_path):
    """A tag may bring a mean and deviation of its own to the same weights."""
    config = tiny(tmp_path, "train.epochs=1", "resume=auto")
    train(config)
    clip = load_clip(config.model.name, str(weights))
    clip.config["preprocess_cfg"] |= {"mean": (0.5, 0.5, 0.5)}
    said = r"differs: preprocessing \(mean \[0.5, 0.5, 0.5\], was \[0.48"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(FrozenModelError, match=said):
        patch.setattr("saferclip_fast.train.frozen.load_clip", lambda *_: clip)
        train(config)


def test_resume_warns_where_rounding_may_differ(tiny, tmp_path):
    train(tiny(tmp_path, "train.epochs=1"))
    with pytest.warns(UserWarning, match="threads changed since .*: not bit for bit the same run"):
        train(tiny(tmp_path, "train.epochs=1", "resume=auto", "threads=2"))


NOT_FINITE = r"not finite in step 2 \(epoch 1, scenes:n=96\S* rows \d+(, \d+){7}\)"


def test_loss_that_is_not_finite_stops_the_run_before_a_checkpoint(tiny, tmp_path):
    config = tiny(tmp_path, "optimizer.lr=1e30", "optimizer.clip_norm=0", "log.every_steps=1000")
    with pytest.raises(FloatingPointError, match=NOT_FINITE + ": lower optimizer.lr.*or leave such steps out with"):
        train(config)
    for path in (tmp_path / "checkpoints").glob("*.safetensors"):
        assert int(path.stem.split("-")[1]) <= 2


def spoil(monkeypatch, step):
    """The loss of one step becomes NaN."""
    loss = Trainer.loss

    def spoiled(self, current, batch, split, *share):
        out = loss(self, current, batch, split, *share)
        return (
            out._replace(loss=out.loss * math.nan)
            if split is self.data.train and self.state.progress.step == step
            else out
        )

    monkeypatch.setattr(Trainer, "loss", spoiled)


def test_a_full_device_ends_with_what_to_do(monkeypatch, capsys):
    def full(config):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("saferclip_fast.train.train", full)
    assert main(["data.train=scenes:n=9"]) == 2
    assert "train.micro_batch_size=16" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_step_that_is_not_finite_is_left_out_by_option(tiny, tmp_path, monkeypatch, precision):
    spoil(monkeypatch, step=1)
    words = (f"train.precision={precision}", "train.on_nan=skip", "train.epochs=1")
    with pytest.warns(UserWarning, match=NOT_FINITE + "; it was left out"):
        train(tiny(tmp_path / "skipped", *words))
    lines = log_lines(tmp_path / "skipped")
    assert all(math.isfinite(value) for line in lines for value in line.values() if isinstance(value, float))
    # the same run whose second step changes nothing, gradient and Adam's count included
    monkeypatch.undo()
    step = torch.optim.Adam.step
    calls = []

    def skipping(self, *arguments, **options):
        calls.append(self)
        return None if len(calls) == 2 else step(self, *arguments, **options)

    if precision == "fp32":  # the fp16 scaler skips other steps besides
        monkeypatch.setattr(torch.optim.Adam, "step", skipping)
        train(tiny(tmp_path / "without", *words))
        assert final_weights(tmp_path / "skipped") == final_weights(tmp_path / "without")


def test_adapters_without_effect_are_reported():
    used, unused = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    used.grad = torch.ones(1)
    check_all_used({"used": used})
    with pytest.raises(ValueError, match=r"1 trainable parameters take no part in the embeddings \(b \.\.\.\)"):
        check_all_used({"a": used, "b": unused})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.train="], "data.train is empty: name the training quadruplets"),
        (["objective.k=87"], "objective.k=87 is more than the 86 training samples"),
        (["device=cuda:9"], "device=cuda:9"),
        (["device=tpu9x"], "device='tpu9x' is none"),
        (["model.name=ViT-tiny-9-32"], "unknown model 'ViT-tiny-9-32', did you mean 'ViT-tiny-8-32'?"),
        (["model.pretrained=none.safetensors"], "weights file"),
    ],
)
def test_mistakes_end_with_one_line(tiny, tmp_path, capsys, words, message):
    config = tiny(tmp_path / "run", *words)
    file = tmp_path / "config.json"  # JSON is YAML
    file.write_text(json.dumps(asdict(config)))
    assert main(["--config", str(file)]) == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "run").exists()
    with pytest.raises((ConfigError, ValueError, FileNotFoundError), match=message.replace("?", r"\?")):
        train(config)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_clipped_after_unscaling(tiny, tmp_path, monkeypatch, precision):
    norms = []
    step = torch.optim.Adam.step

    def measured(self, *arguments, **options):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", measured)
    train(tiny(tmp_path, f"train.precision={precision}", "optimizer.clip_norm=0.01"))
    applied = [norm for norm in norms if math.isfinite(norm)]  # the fp16 scaler skips until its scale fits
    assert len(applied) == 20 if precision == "fp32" else len(applied) > 8
    assert all(norm == pytest.approx(0.01, rel=1e-3) for norm in applied)


def test_learning_rate_schedules():
    constant = OptimizerOptions(lr=1.0, warmup_steps=4)
    assert [learning_rate(constant, s, 20) for s in (0, 1, 3, 4, 19)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = OptimizerOptions(lr=1.0, warmup_steps=4, schedule="cosine")
    assert [learning_rate(cosine, s, 20) for s in (3, 4)] == [1.0, 1.0]
    assert learning_rate(cosine, 12, 20) == pytest.approx(0.5)
    assert learning_rate(cosine, 20, 20) == pytest.approx(0.0)


def test_weight_decay_spares_vectors():
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    build_optimizer(OptimizerOptions(name="adamw", lr=0.1, weight_decay=0.5), {"m": matrix, "v": vector}).step()
    assert torch.allclose(matrix, torch.full((2, 2), 0.95)) and torch.equal(vector, torch.ones(2))


@pytest.fixture(autouse=True)
def no_unexpected_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.*")
        yield
