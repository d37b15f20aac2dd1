"""A new kind of unsafe content patched in: what changes and what does not, from Python and by the command."""

import json
import warnings
from pathlib import Path

import pytest
import torch

import saferclip_fast as sf
from saferclip_fast.config import ConfigError, load_config
from saferclip_fast.data import DataError, open_quadruplets, open_rows
from saferclip_fast.evaluate.metrics import Labels
from saferclip_fast.evaluate.right_items import Contents
from saferclip_fast.models import ClipModel
from saferclip_fast.objectives import SaferClip
from saferclip_fast.patch import call, fit, folder, replay
from saferclip_fast.patch.__main__ import main
from saferclip_fast.patch.call import STEPS, _largest
from saferclip_fast.patch.fit import layers_of
from saferclip_fast.patch.places import STAGE
from saferclip_fast.train import train
from tests.support.tiny import tiny

PAIRS = "scenes:n=4,seed=9,hazards=smoke"
SHORT = {"steps": 3, "rank": 2, "max_loss": 1.0, "progress": False}
KNOWN = "data.train=scenes:n=96,hazards=fire+tape"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    where = tmp_path_factory.mktemp("patch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        weights = sf.load_clip("ViT-tiny-8-32").export(where / "weights")
    train(tiny(where / "run", weights, where / "cache", KNOWN))
    return where / "run"


@pytest.fixture(scope="module")
def patched(run, tmp_path_factory):
    return sf.patch(run, PAIRS, tmp_path_factory.mktemp("patched") / "out", **SHORT)


def weights_of(clip):
    return clip.model.state_dict()


def files_of(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_every_change_is_of_low_rank_and_only_layers_with_adapters_change(run, patched):
    before, after = weights_of(sf.load(run)), weights_of(patched.model)
    changes = {name: after[name] - value for name, value in before.items() if not torch.equal(after[name], value)}
    assert changes and all(name.endswith("weight") and value.dim() >= 2 for name, value in changes.items())
    assert any(name.startswith("visual.") for name in changes) and any("visual." not in name for name in changes)
    assert set(changes) <= {f"{name}.weight" for name in layers_of(patched.model)}
    for name, value in changes.items():
        s = torch.linalg.svdvals(value.double().flatten(1))
        assert s[2] < 1e-4 * s[0], name  # what is left are rounding errors of float32


def test_other_commands_read_the_folder(run, patched, tmp_path):
    assert sorted(file.name for file in patched.out.iterdir()) == [
        *("energy.png", "open_clip_config.json", "open_clip_model.safetensors", "patch.json")
    ]
    assert (patched.out / "energy.png").stat().st_size > 1000
    after = weights_of(patched.model)
    assert all(torch.equal(value, after[name]) for name, value in weights_of(sf.load(patched.out)).items())
    found = sf.evaluate(patched.out, "scenes:n=8", frozen=str(run), samples=10, progress=False)
    assert 0 <= found["unsafe_rate@10"].tuned.value <= 1
    sf.export(patched.out, tmp_path / "export", "open_clip")


def test_what_was_done_is_written_and_printed(patched):
    written = json.loads((patched.out / "patch.json").read_text())
    assert written["pairs"] == patched.pairs == 4 and written["part"] == patched.part == 1
    assert written["recipe"]["steps"] == 3 and written["recipe"]["rank"] == 2 and written["recipe"]["seed"] == 0
    assert written["weights_hash"] == patched.model.weights_hash and written["figures"] == patched.figures
    names = ["pairs.unsafe_rate@10", "unsafe_rate@10", *replay.HELD]
    assert list(patched.figures["before"]) == list(patched.figures["after"]) == names
    layers = written["energy"]["layers"]
    assert len(layers) == len(patched.spectra) and written["energy"]["ranks"] == [1, 2, 4, 8, 16, 32]
    for energy in [written["energy"]["all"], *(layer["energy"] for layer in layers)]:
        assert energy == sorted(energy) and 0 < energy[0] <= energy[-1] <= 1 + 1e-9
    assert "1.00 of the change kept; 4 pairs" in str(patched) and "saferclip train" not in str(patched)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(run, patched, tmp_path):
    again = sf.patch(run, PAIRS, tmp_path / "again", **SHORT)
    assert again.model.weights_hash == patched.model.weights_hash and again.figures == patched.figures
    other = sf.patch(run, PAIRS, tmp_path / "other", seed=1, **SHORT)
    assert other.model.weights_hash != patched.model.weights_hash


def test_nothing_of_the_run_and_nothing_of_torch_changes(run, tmp_path):
    before, threads = files_of(run), torch.get_num_threads()
    state, strict = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    sf.patch(run, PAIRS, tmp_path / "out", **SHORT)
    assert files_of(run) == before and torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state) and torch.are_deterministic_algorithms_enabled() == strict


def test_what_the_pairs_ask_for_is_done(run, tmp_path, monkeypatch):
    asked = []

    def watched(*parts):
        asked.append(parts)
        return fit.gradient_loss(*parts)

    monkeypatch.setattr(call, "gradient_loss", watched)
    found, other = (
        sf.patch(run, pairs, tmp_path / name, steps=40, rank=8, lr=3e-3, max_loss=1.0, progress=False)
        for name, pairs in (("out", PAIRS), ("other", PAIRS.replace("smoke", "fire")))
    )
    (clip, *rest), *_ = asked
    before, after, without = (float(fit.gradient_loss(model, *rest)) for model in (clip, found.model, other.model))
    assert found.part == 1 and after < min(0.96 * before, without), (
        "it is these pairs, not more training, that lower it"
    )


def test_pairs_and_rows_of_the_run_go_in_together_with_their_own_labels(run, tmp_path, monkeypatch):
    seen = []

    def watched(self, current, frozen, bank, neighbors, text, image, *rest):
        seen.append((len(current.safe_text), text.tolist(), image.tolist()))
        return forward(self, current, frozen, bank, neighbors, text, image, *rest)

    forward = SaferClip.forward
    monkeypatch.setattr(SaferClip, "forward", watched)
    data = open_quadruplets("scenes:n=6,seed=2,mixed=0.7")
    labels = sorted((r.unsafe_text_label, r.unsafe_image_label) for r in data.records)
    assert len(set(labels)) > 1
    sf.patch(run, "scenes:n=6,seed=2,mixed=0.7", tmp_path / "out", **SHORT)
    assert sorted(zip(*seen[0][1:], strict=True)) == labels and seen[0][0] == 6, "the gradient is the pairs' alone"
    assert len(seen) == 1 + SHORT["steps"]
    for count, text, image in seen[1:]:
        assert count == 22 and text[:16] == image[:16] == [1] * 16
        assert sorted(zip(text[16:], image[16:], strict=True)) == labels


def test_rows_are_those_of_the_frozen_model(run, tmp_path, monkeypatch):
    given = []

    def watched(clip, loss, old, pairs, *rest):
        given.append((old, pairs))
        return fit(clip, loss, old, pairs, *rest)

    fit = call.fit
    monkeypatch.setattr(call, "fit", watched)
    sf.patch(run, PAIRS, tmp_path / "out", **SHORT)
    (old, pairs) = given[0]
    frozen = sf.load(run, dial=0)
    for rows, data in ((old.rows, old.data), (pairs.rows, pairs.data)):
        wanted = replay.embed_quadruplets(frozen, data, tmp_path / "cache", progress=False).embeddings
        for value, other in zip(rows, wanted, strict=True):
            torch.testing.assert_close(value, other)
    known, trained = open_quadruplets(KNOWN[11:]), {record.unsafe_text for record in old.data.records}
    assert len(old.data) == 86 and trained <= set(known.unsafe_captions), "what training held out is not replayed"


@pytest.mark.parametrize("name", ["safeclip", "shieldclip"])
def test_a_run_of_another_objective_goes_on_with_it(run, tmp_path, monkeypatch, name):
    def other(*values):
        raise AssertionError("not this run's objective")

    monkeypatch.setattr(SaferClip, "forward", other)
    weights = run.parent / "weights" / "open_clip_model.safetensors"
    words = (KNOWN, f"objective.name={name}", "train.epochs=1", "lora.dropout=0")
    train(tiny(tmp_path / "run", weights, tmp_path / "cache", *words))
    assert sf.patch(tmp_path / "run", PAIRS, tmp_path / "out", **SHORT).part == 1


def test_the_command_patches_and_prints(run, tmp_path, capsys):
    words = [str(run), "--pairs", PAIRS, "--out", str(tmp_path / "out"), "--steps", "2", "--max-loss", "1", "--quiet"]
    assert main([*words, "objective.page=0.1"]) == 0
    printed = capsys.readouterr().out
    assert "before" in printed and "the gradient's energy" in printed and str(tmp_path / "out") in printed
    assert main(words) == 2 and "holds files already" in capsys.readouterr().err
    for word, message in (("lora.rank=2", "lora.rank is not taken"), ("data.nothing=1", "data.nothing")):
        assert main([*words[:3], "--out", str(tmp_path / "other"), word]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("fails", ["draw_energy", "export", "replace"])
def test_what_fails_while_it_writes_leaves_no_model_and_the_next_one_writes(run, tmp_path, monkeypatch, fails):
    def stop(*values):
        raise OSError(28, "No space left on device")

    def in_stage(file):
        return file.parent.name == STAGE and not file.name.startswith(".")

    out = tmp_path / "out"
    with monkeypatch.context() as patching:
        if fails == "replace":  # of the weights: the configuration must not be there yet
            move = Path.replace
            patching.setattr(
                Path, "replace", lambda self, to: stop() if in_stage(self) and "model" in self.name else move(self, to)
            )
        else:
            patching.setattr(*((folder, "draw_energy") if fails == "draw_energy" else (ClipModel, "export")), stop)
        with pytest.raises(OSError, match="No space left"):
            sf.patch(run, PAIRS, out, **SHORT)
    assert not (out / "open_clip_config.json").exists() and not (out / STAGE).exists()
    with pytest.raises((ValueError, FileNotFoundError)):
        sf.load(out)
    assert fails == "replace" or not out.exists()


def test_what_a_killed_process_left_is_no_hindrance(run, tmp_path):
    (tmp_path / "out" / STAGE).mkdir(parents=True)
    (tmp_path / "out" / STAGE / "open_clip_model.safetensors").write_bytes(b"half")
    found = sf.patch(run, PAIRS, tmp_path / "out", **SHORT)
    assert not (found.out / STAGE).exists() and sf.load(found.out).weights_hash == found.model.weights_hash


def test_nothing_that_is_there_is_replaced(run):
    before = files_of(run)
    for taken in (run, run / "final"):
        with pytest.raises(FileExistsError, match="holds files already"):
            sf.patch(run, PAIRS, taken, **SHORT)
    assert files_of(run) == before


def test_pairs_come_in_memory_too_and_one_is_enough(run, tmp_path):
    scene = open_quadruplets("scenes:n=1,seed=9,hazards=smoke")
    row = {"safe_image": scene.safe_images[0], "unsafe_image": scene.unsafe_images[0]}
    row |= {name: scene[0][name] for name in ("safe_text", "unsafe_text")}
    found = sf.patch(run, [row], tmp_path / "out", **SHORT)
    assert found.pairs == 1 and found.part == 1


def test_images_of_a_table_lie_beside_it_whatever_the_runs_root_is(run, tmp_path):
    moved = tmp_path / "run"
    moved.mkdir()
    config = load_config(run / "config.yaml", [f"data.root={tmp_path / 'elsewhere'}", f"run_dir={moved}"])
    assert call._of_pairs(config, ()).data.root == ""
    assert call._of_pairs(config, ["data.root=here"]).data.root == "here"
    assert call._of_pairs(config, {"objective.page": 0.2}).objective.page == 0.2
    kept = open_rows(open_quadruplets(PAIRS), tmp_path / "pairs", progress=False)
    assert sf.patch(run, kept.summary.source, tmp_path / "out", **SHORT).pairs == 4


def test_more_than_a_few_pairs_are_sent_to_training(run, tmp_path):
    found = sf.patch(run, "scenes:n=33,seed=9", tmp_path / "out", **SHORT)
    assert found.pairs == 33 and "meant for 1 to 32 pairs" in str(found) and "saferclip train" in str(found)


def test_what_cannot_be_patched_is_said(run, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"no/run: give the folder of the run"):
        sf.patch("no/run", PAIRS, out, **SHORT)
    with pytest.raises(ConfigError, match=r"is no run: give the folder of the run that made the model safe"):
        sf.patch(run / "final", PAIRS, out, **SHORT)
    with pytest.raises(DataError, match=r"no such file or folder: no\.csv"):
        sf.patch(run, "no.csv", out, **SHORT)
    with pytest.raises(DataError, match="has no rows"):
        sf.patch(run, [], out, **SHORT)
    (tmp_path / "empty.csv").write_text("safe_image,unsafe_image,safe_text,unsafe_text\n")
    with pytest.raises(DataError, match="no usable quadruplet"):
        sf.patch(run, tmp_path / "empty.csv", out, **SHORT)
    scene = open_quadruplets("scenes:n=1")
    row = {
        "safe_image": scene.safe_images[0],
        "unsafe_image": scene.safe_images[0],
        "safe_text": "a",
        "unsafe_text": "b",
    }
    with pytest.raises(DataError, match="no pair has an unsafe side, all of them are labeled safe"):
        sf.patch(run, [row | {"unsafe_text_label": 0, "unsafe_image_label": 0}], out, **SHORT)
    for wrong in ({"steps": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"rank": 0}, {"max_loss": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("_", "-")):
            sf.patch(run, PAIRS, out, **SHORT | wrong)
    for word in ("objective.name=safeclip", "data.val=a.csv", "train.epochs=2"):
        with pytest.raises(ConfigError, match="is not taken"):
            sf.patch(run, PAIRS, out, options=[word], **SHORT)
    assert not out.exists()


def test_training_data_that_is_gone_is_named_and_other_data_is_taken(run, tmp_path):
    table = open_rows(open_quadruplets("scenes:n=40,hazards=fire"), tmp_path / "data", progress=False).summary.source
    weights = run.parent / "weights" / "open_clip_model.safetensors"
    words = (f"data.train={table}", "train.epochs=1", "lora.dropout=0")
    train(tiny(tmp_path / "run", weights, tmp_path / "cache", *words))
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"training data, which a patch goes over again, .* with --replay SOURCE"):
        sf.patch(tmp_path / "run", PAIRS, tmp_path / "out", **SHORT)
    there = table.replace(str(tmp_path / "data"), str(tmp_path / "moved"))
    assert sf.patch(tmp_path / "run", PAIRS, tmp_path / "out", replay=there, **SHORT).pairs == 4


def test_a_run_without_unsafe_images_is_refused(run, tmp_path):
    weights = run.parent / "weights" / "open_clip_model.safetensors"
    train(tiny(tmp_path / "run", weights, tmp_path / "cache", "data.text_only=true", "train.epochs=1"))
    with pytest.raises(ConfigError, match=r"without unsafe images \(data\.text_only\), and a patch needs them"):
        sf.patch(tmp_path / "run", PAIRS, tmp_path / "out", **SHORT)


def as_measured(queries=1000, **values):
    names = [replay.RATE, *replay.HELD]
    return replay.Measured({name: values.get(name, 0.5) for name in names}, dict.fromkeys(names, queries))


@pytest.mark.parametrize("edge", [1.0, 0.9, 0.5, 0.07])
def test_the_largest_part_with_which_nothing_gets_worse_is_kept(edge):
    asked, last = [], list(replay.HELD)[-1]

    def measure(part):
        asked.append(part)
        return as_measured(**({last: 0.48} if part > edge else {replay.RATE: 0.509}))

    part, model, after = _largest(lambda part: part, measure, as_measured(), 0.01)
    assert model == part and part <= edge and (edge - part < 2**-STEPS) and after.figures[replay.RATE] == 0.509
    assert len(asked) == (1 if edge == 1 else STEPS + 1), "the whole of it is tried first, and is enough"


def test_a_change_of_which_no_part_keeps_what_is_held_is_refused():
    with pytest.raises(
        ConfigError, match=r"unsafe_rate@10 of what is replayed is worse by 0\.300, more than --max-loss"
    ):
        _largest(lambda part: part, lambda part: as_measured(**{replay.RATE: 0.8}), as_measured(), 0.01)


def test_losses_point_up_for_rates_and_down_for_retrieval_of_enough_different_queries():
    first, second = list(replay.HELD)[:2]
    after = as_measured(**{replay.RATE: 0.6, first: 0.6, second: 0.3})
    found = replay.losses(as_measured(), after, 0.01)
    assert [found[name] for name in (replay.RATE, first, second)] == pytest.approx([0.1, -0.1, 0.2])
    assert set(found) == {replay.RATE, *replay.HELD}
    assert replay.losses(as_measured(100), after, 0.01) and not replay.losses(as_measured(99), after, 0.01)


def test_queries_that_are_equal_count_once():
    rows = torch.eye(30)
    numbers = torch.arange(30)
    contents = Contents(numbers % 3, numbers, numbers + 30, numbers + 30)
    ones = torch.ones(30, dtype=torch.int64)
    found = replay.measured(
        replay.QuadrupletEmbeddings(*[rows] * 4),
        Labels(contents, ones, ones),
        replay.QuadrupletEmbeddings(*[rows[:2]] * 4),
        torch.ones(2, 2, dtype=torch.bool),
    )
    assert {name: count for name, count in found.queries.items() if "text_to" in name}.popitem()[1] == 3
    assert {name: count for name, count in found.queries.items() if "image_to" in name}.popitem()[1] == 30


def test_a_pairs_unsafe_side_is_found_among_safe_items_alone():
    """By hand: axis 0 holds one safe pair, axis 1 another, and the new pair's unsafe side lies on axis 0 or apart."""
    eye = torch.eye(30)
    safe = eye[:12]
    old = replay.QuadrupletEmbeddings(safe, safe, safe, safe)
    one = eye[20:21]
    apart = replay.QuadrupletEmbeddings(one, one, eye[25:26], -eye[25:26])
    yes = torch.tensor([[True, True]])
    assert replay._pairs_found(old, apart, yes) < 0.5
    together = replay.QuadrupletEmbeddings(one, one, eye[25:26], eye[25:26])
    assert replay._pairs_found(old, together, yes) >= 0.5
    assert replay._pairs_found(old, together, ~yes) == 0
