"""sf.fine_tune: the same run as the command's, whatever holds the model and the data."""

import signal
import subprocess
import sys
import threading

import open_clip
import pytest
import torch
from PIL import Image

import saferclip_fast as sf
from saferclip_fast.config import ConfigError
from saferclip_fast.models.keep import adopt
from saferclip_fast.train import StepInfo, StopTraining, ValidationInfo
from saferclip_fast.train.__main__ import main as command
from saferclip_fast.train.checkpoint import CheckpointError


def final(run_dir) -> bytes:
    return (run_dir / "final" / "open_clip_model.safetensors").read_bytes()


def test_the_result_is_ready_to_use(tuned, clip, rows):
    pixels = torch.stack([tuned.preprocess(row["safe_image"]) for row in rows[:3]])
    image, text = tuned.model(pixels, tuned.tokenizer([row["safe_text"] for row in rows[:3]]))
    assert image.shape == text.shape == (3, 64) and not tuned.model.training
    assert tuned.model.weights_hash not in (clip.weights_hash, "")
    assert open_clip.create_model(f"local-dir:{tuned.run_dir / 'final'}") is not None
    assert tuned.metrics["step"] == 4 and {"val.loss", "val.recall", "val.uni_text"} <= tuned.metrics.keys()


def test_callbacks_are_told_each_step_each_validation_and_the_end(tuned, told):
    steps = [info for info in told if isinstance(info, StepInfo)]
    assert [(info.step, info.steps, info.epoch) for info in steps] == [(1, 4, 1), (2, 4, 1), (3, 4, 2), (4, 4, 2)]
    assert ["loss" in info.metrics for info in steps] == [False, True, False, True]
    validations = [info for info in told if isinstance(info, ValidationInfo)]
    assert [(info.step, info.epoch) for info in validations] == [(2, 1), (4, 2)] and validations[0].best
    best = min(validations, key=lambda info: info.metrics["loss"])
    assert best.best and tuned.metrics["val.loss"] == best.metrics["loss"]
    assert told[-1] is tuned and len(told) == 7


@pytest.fixture(scope="module")
def places(tuned) -> dict[str, str]:
    """Where the run's model and data lie, for runs that name them."""
    [table] = (tuned.run_dir / "data").glob("*.jsonl")
    [weights] = (tuned.run_dir / "pretrained").glob("*/")
    return {"data.train": str(table), "model.name": f"local-dir:{weights}", "model.pretrained": ""}


def test_the_command_line_trains_the_same_weights(tuned, options, places, tmp_path):
    values = {"run_dir": tmp_path / "run", **places}
    for key, value in options.items():
        values |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    assert command([f"{key}={value}" for key, value in values.items()]) == 0
    assert final(tmp_path / "run") == final(tuned.run_dir)


def test_a_model_of_open_clip_trains_the_same_weights_in_any_thread_and_stays_as_it_is(
    tuned, clip, rows, options, tmp_path
):
    model = open_clip.create_model("ViT-tiny-8-32", pretrained=str(clip.export(tmp_path / "weights"))).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frame = pytest.importorskip("pandas").DataFrame(rows)
    results = []
    thread = threading.Thread(
        target=lambda: results.append(
            sf.fine_tune((model, "ViT-tiny-8-32"), frame, options=options, run_dir=tmp_path / "run")
        )
    )
    thread.start()
    thread.join()
    assert final(results[0].run_dir) == final(tuned.run_dir)
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_callers_torch_stays_as_it_was(options, places, clip, tmp_path):
    def state():
        return (
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.get_num_threads(),
            torch.get_rng_state().tolist(),
        )

    torch.manual_seed(12345)
    before = state()
    sf.fine_tune(clip, places["data.train"], options=options | {"train.epochs": 1}, run_dir=tmp_path)
    assert state() == before


def test_a_used_folder_is_refused_untouched_and_resumed_where_asked(tuned, clip, rows, options):
    files = {path: path.read_bytes() for path in tuned.run_dir.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="holds a run: pass resume=auto"):
        sf.fine_tune(clip, rows[:20], options=options, run_dir=tuned.run_dir)
    assert files == {path: path.read_bytes() for path in tuned.run_dir.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"from another run: .*data_hash"):
        sf.fine_tune(clip, rows[:40], options=options | {"resume": "auto"}, run_dir=tuned.run_dir)
    again = sf.fine_tune(clip, rows, options=options | {"resume": "auto"}, run_dir=tuned.run_dir)
    assert final(again.run_dir) == files[tuned.run_dir / "final" / "open_clip_model.safetensors"]
    assert again.metrics == tuned.metrics


def test_a_callback_that_raises_ends_the_run_and_resuming_goes_on(tuned, clip, rows, options, tmp_path):
    def stop(info):
        if info.step == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sf.fine_tune(clip, rows, options=options, run_dir=tmp_path / "run", on_step=stop)
    again = sf.fine_tune(clip, rows, options=options | {"resume": "auto"}, run_dir=tmp_path / "run")
    assert final(again.run_dir) == final(tuned.run_dir)


def test_an_exported_clip_model_is_taken(tuned, options, places, tmp_path):
    sf.export(tuned, tmp_path / "out", "huggingface")
    few = options | {"train.epochs": 1}
    run = sf.fine_tune(tmp_path / "out" / "huggingface", places["data.train"], options=few, run_dir=tmp_path / "run")
    pixels = torch.stack([tuned.preprocess(Image.new("RGB", (40, 30), (i, 30, 90))) for i in range(2)])
    wanted = tuned.model.encode_image(pixels)
    torch.testing.assert_close(sf.load(run, dial=0).encode_image(pixels), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective.kk": 3}, "options: unknown option 'objective.kk', did you mean 'objective.k'?"),
        (["objective.k=-3"], "objective.k=-3: must be from 1 to 256"),
        ({"train": {"precision": "fp8"}}, "options: train.precision takes one of auto | fp32 | bf16 | fp16"),
        ({"data.train": "x"}, "options: data.train is what the argument 'data' says: leave it out here"),
        (["model.pretrained=openai"], "options: model.pretrained is what the argument 'model' says"),
    ],
)
def test_options_are_checked_before_anything_else(options, message, tmp_path):
    with pytest.raises(ConfigError) as raised:
        sf.fine_tune("no such model", "no such data", options=options, run_dir=tmp_path / "run")
    assert str(raised.value).startswith(message) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "data", "error", "message"),
    [
        ("ViT-tiny-8-32", "no/such.csv", FileNotFoundError | ValueError, "no such file or folder: no/such.csv"),
        ("ViT-tiny-8-33", "scenes:n=9", ValueError, "unknown model 'ViT-tiny-8-33', did you mean 'ViT-tiny-8-32'?"),
        (3, "scenes:n=9", TypeError, "model is a int: give a name and a tag"),
        (torch.nn.Linear(1, 1), "scenes:n=9", TypeError, "does not say its architecture.*give \\(model, 'NAME'\\)"),
        ((torch.nn.Linear(1, 1), None, None), "scenes:n=9", TypeError, "give \\(model, 'NAME'\\)"),
        ((torch.nn.Linear(1, 1), "ViT-tiny-8-32"), "scenes:n=9", ValueError, "a Linear is no open_clip model"),
        ("ViT-tiny-8-32", 3, ValueError, "data is a int: give a path, a DataFrame, a list of dicts"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*random weights")
def test_what_is_no_model_and_no_data_is_named(model, data, error, message, options, tmp_path):
    errors = error.__args__ if hasattr(error, "__args__") else error
    with pytest.raises(errors, match=message):
        sf.fine_tune(model, data, options=options, run_dir=tmp_path / "run")


def test_a_model_of_another_architecture_than_its_name_is_refused(clip):
    model = open_clip.create_model("ViT-tiny-8-32")
    model.visual.transformer.resblocks[0].mlp.gelu = open_clip.transformer.QuickGELU()
    with pytest.raises(ValueError, match="does not compute what ViT-tiny-8-32 computes"):
        adopt(model, "ViT-tiny-8-32")


def test_several_ranks_are_sent_to_the_command(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun"):
        sf.fine_tune("ViT-tiny-8-32", "scenes:n=9")


def test_images_in_two_places_are_refused(clip, rows, options, tmp_path):
    with pytest.raises(ConfigError, match="give both as paths, or both with their images in memory"):
        sf.fine_tune(clip, rows, validation=[dict.fromkeys(rows[0], "x.png")], options=options, run_dir=tmp_path)


def test_the_package_is_light_until_something_is_used():
    code = (
        "import sys, time; start = time.perf_counter(); import saferclip_fast as sf; print(time.perf_counter() - start)"
    )
    code += "; assert 'fine_tune' in dir(sf) and not {'torch', 'numpy', 'omegaconf'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 1


def test_a_callback_stops_training_with_the_result_so_far(clip, rows, options, tmp_path):
    """In the middle of an epoch: what was trained is validated and exported, and a resumed run has nothing to do."""
    seen = []

    def on_step(info):
        if info.step == 3:
            raise StopTraining

    stopped = sf.fine_tune(
        clip, rows, options=options, run_dir=tmp_path / "run", on_step=on_step, on_validation=seen.append
    )
    assert stopped.metrics["step"] in (2, 3) and [info.step for info in seen] == [2, 3]
    before = final(tmp_path / "run")
    again = sf.fine_tune(
        clip, rows, options={**options, "resume": "auto"}, run_dir=tmp_path / "run", on_step=seen.append
    )
    assert len(seen) == 2 and final(tmp_path / "run") == before and again.metrics == stopped.metrics


def test_so_does_one_that_is_told_of_a_validation(clip, rows, options, tmp_path):
    def on_validation(info):
        raise StopTraining

    stopped = sf.fine_tune(clip, rows, options=options, run_dir=tmp_path / "run", on_validation=on_validation)
    assert stopped.metrics["step"] == 2 and (tmp_path / "run" / "final").is_dir()


@pytest.fixture
def ctrl_c():
    """As in a terminal: tests that run in the background inherit that the signal is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_saves_the_step_and_the_run_goes_on_to_the_same_weights(clip, rows, options, tuned, tmp_path):
    def on_step(info):
        if info.step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"saved; fine_tune with options=\{'resume': 'auto'\} goes on with"):
        sf.fine_tune(clip, rows, options=options, run_dir=tmp_path / "run", on_step=on_step)
    steps = []
    sf.fine_tune(clip, rows, options={**options, "resume": "auto"}, run_dir=tmp_path / "run", on_step=steps.append)
    assert [info.step for info in steps] == [4] and final(tmp_path / "run") == final(tuned.run_dir)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
