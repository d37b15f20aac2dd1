"""Every command that reads a run opens the frozen model that it was tuned from; another is one line and exit code 2.

`evaluate`, its dial, `export` at a dial and as adapters, and training that goes on are given other weights, a tag that
has moved, another open_clip, preprocessing, tokenizer, and final/ of another run.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from safetensors.torch import load_file, save_file

from saferclip_fast.config import load_config
from saferclip_fast.evaluate.__main__ import main as evaluate
from saferclip_fast.export.__main__ import main as export
from saferclip_fast.models import load_clip, loading
from saferclip_fast.sources import load_frozen, load_source
from saferclip_fast.train.__main__ import main as train
from saferclip_fast.train.checkpoint import load_checked, save_checked
from saferclip_fast.train.frozen import FrozenModelError, open_for_training
from tests.support.tiny import tiny_words

NAME = "ViT-tiny-8-32"
COMMANDS = {
    "evaluate": lambda run, out: evaluate([str(run), "--out", str(out), "--samples", "20", "--quiet", "--device=cpu"]),
    "dial": lambda run, out: evaluate([str(run), "--dial", "--out", str(out), "--quiet", "--device=cpu"]),
    "alpha": lambda run, out: export([str(run), "--format", "open_clip", "--alpha=0.5", "--out", str(out)]),
    "peft": lambda run, out: export([str(run), "--format", "peft", "--out", str(out)]),
    "resume": lambda run, out: train(["--config", str(run / "config.yaml"), f"run_dir={run}", "resume=auto"]),
}
every_command = pytest.mark.parametrize("command", COMMANDS)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def trained(folder, weights, *words) -> Path:
    """The folder of a run of a few steps."""
    short = ["train.epochs=1", "train.deterministic=false", "lora.dropout=0"]
    assert train([*tiny_words(folder / "run", weights, folder / "cache"), *short, *words]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return trained(folder, shutil.copy(weights, folder / "weights.safetensors"))


@pytest.fixture(scope="module")
def random_finished(tmp_path_factory):
    """A run of random weights."""
    with pytest.warns(UserWarning, match="random weights"):
        return trained(tmp_path_factory.mktemp("random"), "")


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, with weights of its own to change."""
    return copied(finished, tmp_path)


def copied(finished, tmp_path) -> Path:
    shutil.copytree(finished.parent, tmp_path / "a")
    config = tmp_path / "a" / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(finished.parent), str(tmp_path / "a")))
    return tmp_path / "a" / "run"


def swap(file: Path) -> None:
    """Other weights of the same shape."""
    torch.manual_seed(8)
    save_file({name: torch.randn_like(x) * 0.1 for name, x in load_file(file).items()}, file)


def set_option(run: Path, name: str, value: str) -> None:
    config = run / "config.yaml"
    config.write_text(re.sub(rf"(?m)^(  {name}:).*$", rf"\1 {value}", config.read_text()))


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and the time of its last change."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def recorded(run: Path) -> dict:
    return json.loads((run / "final" / "frozen.json").read_text())


def refused(command, run, capsys) -> str:
    """What a command says: one line and exit code 2, and no file is new or changed."""
    before, out = files(run.parents[1]), run.parents[1] / "out"
    capsys.readouterr()
    assert COMMANDS[command](run, out) == 2
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), said
    assert files(run.parents[1]) == before
    return lines[0]


def names_the_run_and_both_hashes(line, run, now=None) -> bool:
    """Where only the rest differs, the two hashes are equal."""
    then = recorded(run)["weights_hash"]
    told = re.search(r"(\S+) was tuned from weights (\w{12}), and .* gives (\w{12}); what differs: ", line)
    return bool(told) and told.groups() == (str(run), then[:12], (now or then)[:12])


def test_a_run_says_what_it_was_tuned_from(finished, weights):
    wanted = load_clip(NAME, str(weights)).weights_hash
    record = recorded(finished)
    assert record["format"] == "saferclip_fast.frozen.v1" and record["open_clip"] == open_clip.__version__
    assert record["weights_hash"] == load_config(finished / "config.yaml").model.weights_hash == wanted
    assert set(record["behavior"]) == {"pixels", "image", "text 1", "text 2"}
    checkpoint = sorted((finished / "checkpoints").iterdir())[-1]
    assert load_checked(checkpoint).state["frozen"] == record
    assert open_clip.create_model(f"local-dir:{finished / 'final'}") is not None
    assert not (finished / "frozen").exists(), "the weights file gives them again"


@every_command
def test_the_same_weights_elsewhere_are_the_same_model(run, tmp_path, command):
    moved = shutil.move(run.parent / "weights.safetensors", tmp_path / "moved.safetensors")
    set_option(run, "pretrained", str(moved))
    assert COMMANDS[command](run, tmp_path / "out") == 0


@every_command
def test_other_weights_in_the_file(run, command, capsys):
    swap(run.parent / "weights.safetensors")
    now = load_clip(NAME, str(run.parent / "weights.safetensors")).weights_hash
    line = refused(command, run, capsys)
    assert names_the_run_and_both_hashes(line, run, now), line
    assert "differs: weights or architecture; let model.pretrained (config.yaml, or the training's words) lead" in line


@every_command
def test_a_tag_that_has_moved(run, command, capsys, monkeypatch):
    """The name of the weights stays, what it loads does not."""
    create, source = open_clip.create_model_and_transforms, [run.parent / "weights.safetensors"]

    def of_tag(name, pretrained=None, **options):
        return create(name, pretrained=str(source[0]) if pretrained == "tag" else pretrained, **options)

    monkeypatch.setattr(open_clip, "create_model_and_transforms", of_tag)
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["tag"])
    set_option(run, "pretrained", "tag")
    load_frozen(run, load_config(run / "config.yaml"))
    source[0] = shutil.copy(source[0], run.parent / "newer.safetensors")
    swap(source[0])
    line = refused(command, run, capsys)
    assert names_the_run_and_both_hashes(line, run, load_clip(NAME, "tag").weights_hash), line
    assert f"{NAME}, tag gives" in line


@every_command
def test_an_open_clip_that_builds_another_model_of_the_same_weights(run, command, capsys, monkeypatch):
    create = open_clip.create_model_and_transforms

    def with_another_activation(*arguments, **options):
        model, *transforms = create(*arguments, **options)
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.GELU):
                    setattr(module, name, QuickGELU())
        return model, *transforms

    monkeypatch.setattr(open_clip, "create_model_and_transforms", with_another_activation)
    monkeypatch.setattr(open_clip, "__version__", "99.0")
    line = refused(command, run, capsys)
    assert names_the_run_and_both_hashes(line, run), line
    assert re.search(r"differs: behavior \(image by \d\.\de-0\d, text 1 by .*\); use the model and the packages", line)
    assert f"open_clip was {recorded(run)['open_clip']} and is 99.0" in line


@every_command
@pytest.mark.parametrize("told", [True, False])
def test_other_preprocessing(run, command, capsys, monkeypatch, told):
    """Whether open_clip's settings name it, or its transform alone has changed."""
    create = open_clip.create_model_and_transforms

    def with_another_mean(*arguments, **options):
        model, train, preprocess = create(*arguments, **options)
        if told:
            model.visual.preprocess_cfg["mean"] = (0.5, 0.5, 0.5)
            return model, train, preprocess
        return model, train, lambda image: preprocess(image) - 0.1

    monkeypatch.setattr(open_clip, "create_model_and_transforms", with_another_mean)
    line = refused(command, run, capsys)
    assert names_the_run_and_both_hashes(line, run), line
    wanted = r"preprocessing \(mean \[0.5, 0.5, 0.5\], was \[0.48" if told else r"behavior \(pixels by \d.\de-0"
    assert re.search(rf"differs: {wanted}", line), line


@every_command
def test_another_tokenizer(run, command, capsys, monkeypatch):
    tokenizer = open_clip.SimpleTokenizer(context_length=77, clean="whitespace")  # keeps capitals
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: tokenizer)
    monkeypatch.setattr(loading, "_SIMPLE", {})  # as in a process of its own
    line = refused(command, run, capsys)
    assert names_the_run_and_both_hashes(line, run), line
    assert re.search(r"differs: tokenizer \(\w{12}, was \w{12}\); use the model and the packages", line), line


@pytest.mark.parametrize("command", ["evaluate", "dial", "alpha", "peft", "plain"])
def test_final_of_another_run(run, random_finished, command, capsys, monkeypatch):
    monkeypatch.setitem(COMMANDS, "plain", lambda run, out: export([str(run), "--format=onnx", "--out", str(out)]))
    then = recorded(run)["weights_hash"]
    shutil.rmtree(run / "final")
    shutil.copytree(random_finished / "final", run / "final")
    now = recorded(run)["weights_hash"]
    line = refused(command, run, capsys)
    assert f"{run / 'final'} is of another run: it was tuned from weights {now[:12]}, the run in {run} from " in line
    assert f"from {then[:12]} (model.weights_hash in config.yaml); put" in line
    (run / "final" / "frozen.json").unlink()
    assert "frozen.json is missing: this final/ is not what the run wrote" in refused(command, run, capsys)
    for content in ("{", "[]", "{}", json.dumps({"format": "saferclip_fast.frozen.v1"}), "\udcff"):
        (run / "final" / "frozen.json").write_text(content, errors="surrogateescape")
        assert "frozen.json is damaged (" in refused(command, run, capsys)


def test_going_on_puts_the_runs_own_final_back(run, random_finished, tmp_path):
    own = recorded(run)
    shutil.rmtree(run / "final")
    shutil.copytree(random_finished / "final", run / "final")
    assert COMMANDS["resume"](run, None) == 0
    assert recorded(run) == own and COMMANDS["evaluate"](run, tmp_path / "out") == 0


def test_weights_pinned_by_their_hash(finished, weights, tmp_path, capsys):
    clip = load_clip(NAME, str(weights))
    words = tiny_words(tmp_path / "run", weights, tmp_path / "cache")
    for pin, said in (
        ("0" * 64, rf"asks for weights 0{{12}}, but {NAME}, \S+ gives {clip.weights_hash[:12]}: give those weights"),
        (clip.weights_hash[:12], "is no SHA-256"),
    ):
        assert train([*words, f"model.weights_hash={pin}"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and re.search(said, lines[0]), lines
        assert files(tmp_path) == {}
    config = load_config(None, [*words, f"model.weights_hash={clip.weights_hash}"])
    assert open_for_training(config, torch.device("cpu")).identity.weights_hash == clip.weights_hash
    assert train(["--config", str(finished / "config.yaml"), f"run_dir={tmp_path / 'run'}", "model.pretrained="]) == 2


def as_before_this_was_recorded(run: Path) -> None:
    """What runs held until now: the hash of the weights in their checkpoints."""
    (run / "final" / "frozen.json").unlink()
    shutil.rmtree(run / "frozen", ignore_errors=True)
    for path in (run / "checkpoints").iterdir():
        _, tensors, state = load_checked(path)
        del state["frozen"], state["config"]["model.weights_hash"]
        save_checked(path, tensors, state)
    config = run / "config.yaml"
    config.write_text(re.sub(r"(?m)^  weights_hash:.*\n", "", config.read_text()))


@every_command
def test_a_run_from_before_is_compared_by_its_checkpoint(run, command, capsys, tmp_path):
    then = recorded(run)["weights_hash"]
    as_before_this_was_recorded(run)
    good = shutil.copy(run.parent / "weights.safetensors", run.parent / "good.safetensors")
    swap(run.parent / "weights.safetensors")
    now = load_clip(NAME, str(run.parent / "weights.safetensors")).weights_hash
    line = refused(command, run, capsys)
    assert f"{run} was tuned from weights {then[:12]}" in line and f"gives {now[:12]}; what differs: weights or" in line
    set_option(run, "pretrained", str(good))
    assert COMMANDS[command](run, tmp_path / "out") == 0
    if command == "resume":
        assert recorded(run)["weights_hash"] == load_config(run / "config.yaml").model.weights_hash == then


def test_nothing_to_compare_with_is_a_warning(run, tmp_path):
    as_before_this_was_recorded(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.warns(UserWarning, match="does not say which weights it was tuned from .* are taken unchecked") as told:
        assert COMMANDS["evaluate"](run, tmp_path / "out") == 0
    assert len(told) == 1 and "\n" not in str(told[0].message)


def test_random_weights_are_the_same_frozen_model_in_every_process(random_finished, tmp_path):
    wanted = load_file(random_finished / "frozen" / "open_clip_model.safetensors")
    for number in range(2):
        words = ["saferclip_fast.export", random_finished, "--format", "open_clip", "--alpha", "0", "--out"]
        subprocess.run([sys.executable, "-m", *map(str, words), str(tmp_path / f"{number}")], check=True)
        found = load_file(tmp_path / f"{number}" / "open_clip" / "open_clip_model.safetensors")
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    frozen = load_source(random_finished).frozen()
    assert frozen.weights_hash == recorded(random_finished)["weights_hash"] and frozen.name == NAME


@every_command
def test_random_weights_that_were_kept_serve_every_command(random_finished, command, tmp_path):
    run = copied(random_finished, tmp_path)
    torch.manual_seed(12345)
    assert COMMANDS[command](run, tmp_path / "out") == 0
    if command == "evaluate":
        models = json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"]
        assert models["frozen"] == {"name": NAME, "weights_hash": recorded(run)["weights_hash"]}


@every_command
@pytest.mark.parametrize("fault", ["missing", "no weights", "cut off", "other weights"])
def test_random_weights_that_are_damaged_or_missing(random_finished, command, fault, tmp_path, capsys):
    run = copied(random_finished, tmp_path)
    file = run / "frozen" / "open_clip_model.safetensors"
    if fault == "missing":
        shutil.rmtree(run / "frozen")
    elif fault == "no weights":
        file.unlink()
    elif fault == "cut off":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        swap(file)
    line = refused(command, run, capsys)
    if fault == "other weights":
        assert names_the_run_and_both_hashes(line, run, load_clip(f"local-dir:{file.parent}").weights_hash), line
        assert f"put {file.parent} back from a copy" in line
    else:
        assert f"{file.parent} holds the random weights that the run was tuned from, and is damaged or missing" in line


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_random_weights_of_a_run_from_before_are_drawn_again(random_finished, tmp_path):
    run = copied(random_finished, tmp_path)
    as_before_this_was_recorded(run)
    config, wanted = load_config(run / "config.yaml"), recorded(random_finished)["weights_hash"]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert load_frozen(run, config).weights_hash == wanted
    assert torch.equal(torch.get_rng_state(), before), "nothing else is seeded"
    config.seed = 1
    with pytest.raises(FrozenModelError, match=f"was tuned from weights {wanted[:12]}"):
        load_frozen(run, config)
    assert COMMANDS["resume"](run, None) == 0 and (run / "frozen" / "open_clip_model.safetensors").is_file()
