"""Options: what is accepted, what is refused and how, and that the documents list them all."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from saferclip_fast.config import ConfigError, flatten, load_config, option_table, options
from saferclip_fast.ops.backends import MAX_NATIVE_K
from saferclip_fast.train.__main__ import main

DOCS = Path(__file__).parents[1] / "docs" / "training.md"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lora.rnk=4", "command line: unknown option 'lora.rnk', did you mean 'lora.rank'?"),
        ("lr=1e-3", "command line: unknown option 'lr', did you mean 'optimizer.lr'?"),
        ("qqq.zzz=1", "command line: unknown option 'qqq.zzz'; --help lists all options"),
        ("lora=4", "command line: unknown option 'lora', did you mean 'lora.rank'?"),
        ("lora.rank", "'lora.rank' is not key=value, did you mean 'lora.rank'?"),
        ("lora.rank=4.5", "command line: lora.rank takes a whole number: Value '4.5'"),
        ("optimizer.lr=fast", "command line: optimizer.lr takes a number: Value 'fast'"),
        ("log.progress=maybe", "command line: log.progress takes true or false: "),
        ("lora.targets=c_fc", "command line: lora.targets takes a list: "),
        ("train.precision=bf17", "command line: train.precision takes one of auto | fp32 | bf16 | fp16: Invalid value"),
        ("optimizer.lr=nan", "optimizer.lr=nan: must be a finite number"),
        ("lora.rank=0", "lora.rank=0: must be at least 1 (inner width of the adapters)"),
        ("lora.dropout=1.5", "lora.dropout=1.5: must be from 0 to 1 "),
        (
            "objective.weights.uni_txt=1",
            "unknown option 'objective.weights.uni_txt', did you mean 'objective.weights.uni",
        ),
    ],
)
def test_bad_words_are_explained(word, message):
    with pytest.raises(ConfigError) as error:
        load_config(None, [word])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {rnk: 4}", "unknown option 'lora.rnk', did you mean 'lora.rank'?"),
        ("lora: {rank: many}", "lora.rank takes a whole number"),
        ("lora: 4", "unknown option 'lora'"),
        ("- lora", "expected `key: value` lines, found a list"),
        ("lora: [", "not valid YAML"),
        ("3", "holds no `key: value` lines"),
    ],
)
def test_bad_files_are_explained(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert message in str(error.value) and "bad.yaml" in str(error.value)


def test_missing_file_names_the_shipped_ones():
    with pytest.raises(ConfigError, match=r"config file nowhere\.yaml not found; shipped configs: .*paper"):
        load_config("nowhere.yaml")


def test_words_go_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optimizer: {lr: 1e-3, eps: 1e-7}\nlora: {targets: [c_fc, c_proj]}\n")
    config = load_config(file, ["optimizer.lr=2e-3", "model.pretrained=", "data.train=scenes:n=9,size=32"])
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.beta1) == (2e-3, 1e-7, 0.9)
    assert config.lora.targets == ["c_fc", "c_proj"]
    assert (config.model.pretrained, config.data.train) == ("", "scenes:n=9,size=32")


def test_paper_config_is_the_papers_recipe():
    config = load_config("paper")
    assert (config.model.name, config.model.pretrained) == ("ViT-L-14-quickgelu", "openai")
    assert (config.model.tuning, config.lora.rank, config.curriculum.enabled) == ("lora", 16, True)
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.schedule) == ("adam", 1e-4, "constant")
    assert (config.train.batch_size, config.train.epochs) == (48, 9)
    objective = config.objective
    assert (objective.neighbors, objective.k, objective.beta, objective.margin) == ("offline", 1, 1.0, 0.0)
    assert objective.negative == "frozen" and objective.weights.rank_guard == 0


def test_explicit_options_win_over_the_preset_wherever_it_is_chosen(tmp_path):
    def shown(config):
        objective = config.objective
        return objective.k, objective.beta, objective.negative, objective.weights.cos_text, config.curriculum.enabled

    ours, paper = load_config(), load_config(None, ["objective.preset=paper"])
    assert shown(ours) == (16, 10.0, "current", 16.0, True)
    assert shown(paper) == (1, 1.0, "frozen", 1.0, True)
    file = tmp_path / "run.yaml"
    file.write_text("objective: {k: 4}\ncurriculum: {enabled: false}\n")
    words = ["objective.beta=3", "objective.preset=paper"]
    assert shown(load_config(file, words)) == (4, 3.0, "frozen", 1.0, False)
    file.write_text("objective: {preset: paper, beta: 3}\n")
    assert shown(load_config(file, ["objective.weights.cos_text=8"])) == (1, 3.0, "frozen", 8.0, True)
    assert shown(load_config(file, ["objective.preset=default"])) == (*shown(ours)[:1], 3.0, *shown(ours)[2:])


def test_baselines_have_no_curriculum_unless_asked_for():
    for name in ("safeclip", "shieldclip"):
        assert not load_config(None, [f"objective.name={name}"]).curriculum.enabled
        assert load_config(None, [f"objective.name={name}", "curriculum.enabled=true"]).curriculum.enabled


def test_the_largest_k_is_that_of_the_kernels():
    """The number is written out there, so that options are read without torch."""
    highest = {option.key: option.high for option in options() if option.key.split(".")[-1] in ("k", "guard_k")}
    assert highest == {"objective.k": MAX_NATIVE_K, "objective.guard_k": MAX_NATIVE_K}


def test_every_option_has_a_meaning_and_its_own_key():
    listed = list(options())
    assert all(o.meaning for o in listed)
    assert [o.key for o in listed] == list(flatten(load_config()))


def test_documented_table_is_the_real_one():
    text = DOCS.read_text(encoding="utf-8")
    assert option_table() in text, (
        "docs/training.md has an old option table; paste what this prints: "
        'python -c "from saferclip_fast.config import option_table; print(option_table())"'
    )


def test_help_lists_every_option_with_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for o in options():
        assert f"  {o.key}=" in text and o.meaning in text
    assert "optimizer.lr=0.0001  (float)" in text


def test_command_line_reports_mistakes_without_a_traceback():
    words = [sys.executable, "-m", "saferclip_fast.train", "--config", "paper", "--resume", "atuo"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: command line: resume takes one of never | auto: Invalid value 'atuo'")
    assert "Traceback" not in done.stderr


def test_resolved_config_can_be_read_again(tmp_path):
    from omegaconf import OmegaConf

    config = load_config("paper", ["optimizer.lr=3e-4", "lora.targets=[c_fc]"])
    OmegaConf.save(OmegaConf.structured(config), tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lora"]["targets"] == ["c_fc"]
    assert load_config(tmp_path / "config.yaml") == config


def test_values_by_their_keys_are_the_words_that_say_the_same(tmp_path):
    """As Python gives them: dotted or nested, paths and tuples too."""
    given = {"objective": {"k": 3, "weights": {"nce_text": 1}}, "train.epochs": 2, "run_dir": tmp_path}
    words = ["objective.k=3", "objective.weights.nce_text=1", "train.epochs=2", f"run_dir={tmp_path}"]
    assert load_config("paper", given) == load_config("paper", words)
    assert load_config(None, {"lora.targets": ("c_fc", "c_proj")}).lora.targets == ["c_fc", "c_proj"]
    assert load_config(None, {"objective.name": "safeclip"}).train.batch_size == 128  # what a choice brings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective.kk": 3}, "options: unknown option 'objective.kk', did you mean 'objective.k'?"),
        ({"k": 3}, "options: unknown option 'k', did you mean 'objective.k'?"),
        ({"objective": {"k": -3}}, "objective.k=-3: must be from 1 to 256"),
        ({"objective.k": True}, "options: objective.k takes a whole number"),
        ({"train.precision": "fp8"}, "options: train.precision takes one of auto | fp32 | bf16 | fp16"),
        ({"objective.k": None}, "objective.k=None: an option is text, a number, true or false, or a list"),
    ],
)
def test_values_that_an_option_cannot_take_are_named(given, message):
    with pytest.raises(ConfigError) as raised:
        load_config(None, given, "options")
    assert str(raised.value).startswith(message)
