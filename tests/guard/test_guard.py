"""The guard: figures that can be counted by hand, what a fit may look at, the file, the command."""

import json
import shutil
import warnings

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import saferclip_fast as sf
from saferclip_fast.data import DataError
from saferclip_fast.data.quadruplets import QuadrupletEmbeddings
from saferclip_fast.guard import GuardError
from saferclip_fast.guard.__main__ import main
from saferclip_fast.guard.call import Part, Parts, fit_parts
from saferclip_fast.guard.figures import auroc, figures_of
from saferclip_fast.guard.fit import HIDDEN, Items, fit_head
from saferclip_fast.train import train
from tests.support.tiny import tiny

WIDTH = 8


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(weights, tmp_path_factory):
    """A run of one epoch over 96 scenes that held out 24."""
    folder = tmp_path_factory.mktemp("guard")
    train(tiny(folder / "run", weights, folder / "cache", "train.epochs=1", "data.val_fraction=0.25"))
    return folder / "run"


@pytest.fixture(scope="module")
def guard(run):
    return sf.fit_guard(run, samples=50, progress=False)


def items(n, seed, crossed=False, noise=0.3):
    """Unsafe where the first coordinate is positive; crossed: where the first two have different signs."""
    x = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))
    unsafe = (x[:, 0] > 0) ^ (x[:, 1] > 0) if crossed else x[:, 0] > 0
    return Items(x + noise * torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed + 100)), unsafe)


def part(n, seed, text_label=1, image_label=1):
    """Unsafe sides lie a step from the safe ones."""
    safe = torch.randn(2, n, WIDTH, generator=torch.Generator().manual_seed(seed))
    step = 3 * torch.eye(WIDTH)[0]
    embeddings = QuadrupletEmbeddings(safe[0], safe[1], safe[0] + step, safe[1] + step)
    return Part(f"part {seed}", embeddings, torch.full((n,), text_label), torch.full((n,), image_label))


# --- figures


def test_the_area_counts_pairs_and_equal_scores_count_half():
    score, unsafe = torch.tensor([0.1, 0.4, 0.4, 0.9, 0.4, 0.2]), torch.tensor([0, 0, 1, 1, 0, 1]).bool()
    pairs = [float(u > s) + 0.5 * float(u == s) for u in score[unsafe] for s in score[~unsafe]]
    assert auroc(score, unsafe, 10).value == pytest.approx(sum(pairs) / len(pairs))


def test_the_interval_of_the_area_is_delongs():
    found = items(4000, 1, noise=2.0)
    area = auroc(found.embeddings[:, 0], found.unsafe, 2000).interval()
    high, low = found.embeddings[found.unsafe, 0], found.embeddings[~found.unsafe, 0]
    above = (high[:, None] > low[None]).double()
    error = (above.mean(1).var() / len(high) + above.mean(0).var() / len(low)).sqrt()
    assert (area["high"] - area["low"]) / (2 * 1.96) == pytest.approx(float(error), rel=0.08)


def test_calibration_error_and_curves_are_counted_by_hand():
    p, unsafe = torch.tensor([0.05, 0.05, 0.95, 0.95, 1.0, 0.5]), torch.tensor([0, 1, 1, 1, 1, 0]).bool()
    found = figures_of(p, unsafe, 10)
    assert found["ece"] == pytest.approx((2 * 0.45 + 3 * abs(2.9 / 3 - 1) + 0.5) / 6)
    assert [(b["samples"], b["observed"]) for b in found["reliability"]] == [(2, 0.5), (1, 0.0), (3, 1.0)]
    assert found["at_half"] == {"found": 0.75, "false_alarms": 0.5}
    corners = [(round(q["false_alarms"], 3), q["found"]) for q in found["roc"]]
    assert corners == [(0.0, 0.25), (0.0, 0.75), (0.5, 0.75), (1.0, 1.0)]


# --- the fit


def test_the_smaller_head_wins_where_it_does_as_well():
    straight = fit_head("text", items(1000, 1), items(400, 2), seed=0, progress=False)
    crossed = fit_head("text", items(1000, 1, True), items(400, 2, True), seed=0, progress=False)
    assert (straight.head.hidden, crossed.head.hidden) == (0, HIDDEN)
    assert set(straight.tried) == {0, HIDDEN} and crossed.tried[HIDDEN] > crossed.tried[0] + 0.2


def test_probabilities_are_calibrated_on_data_that_was_not_looked_at():
    head = fit_head("text", items(150, 1, True, 1.0), items(2000, 2, True, 1.0), seed=0, progress=False).head
    fresh = items(4000, 3, True, 1.0)
    calibrated = figures_of(head(fresh.embeddings), fresh.unsafe, 10)["ece"]
    raw = figures_of(torch.sigmoid(head.score(fresh.embeddings)), fresh.unsafe, 10)["ece"]
    assert calibrated < 0.03 and calibrated < raw


def test_the_test_part_chooses_nothing_and_a_fit_can_be_repeated(clip):
    first, again, other = (
        fit_parts(clip, Parts(part(200, 1), part(80, 2), test), 20, progress=False)
        for test in (part(80, 3), part(80, 3), part(50, 4))
    )
    assert first.figures == again.figures != other.figures
    for name in ("text", "image"):
        states = [getattr(guard, name).state_dict() for guard in (first, again, other)]
        assert all(torch.equal(states[0][key], state[key]) for state in states[1:] for key in state)
    assert first.figures["modalities"]["text"]["auroc"]["value"] > 0.9


def test_what_is_labeled_safe_is_safe(clip):
    """Half of the unsafe side's texts are labeled safe; those that are so lie a step the other way."""
    found = []
    for seed in (1, 2, 3):
        whole = part(200, seed)
        flipped = whole.text_is_unsafe.clone()
        flipped[::2] = 0
        text = whole.embeddings.unsafe_text.clone()
        text[::2] -= 6 * torch.eye(WIDTH)[0]
        found.append(Part(whole.source, whole.embeddings._replace(unsafe_text=text), flipped, whole.image_is_unsafe))
    guard = fit_parts(clip, Parts(*found), 20, progress=False)
    entry = guard.figures["modalities"]["text"]
    assert (entry["unsafe"], entry["safe"]) == (100, 300) and entry["auroc"]["value"] > 0.9
    p = guard.text(found[2].embeddings.unsafe_text)
    assert p[::2].mean() < 0.2 < 0.7 < p[1::2].mean()


def test_a_modality_without_anything_unsafe_has_no_guard(clip):
    guard = fit_parts(clip, Parts(*(part(60, seed, image_label=0) for seed in (1, 2, 3))), 20, progress=False)
    assert guard.image is None and guard.text is not None and set(guard.figures["modalities"]) == {"text"}
    with pytest.raises(GuardError, match="knows no images"):
        guard.of_images([Image.new("RGB", (9, 9))])
    with pytest.raises(DataError, match="part 2 holds no unsafe image"):
        fit_parts(clip, Parts(part(60, 1), part(60, 2, image_label=0), part(60, 3)), 20, progress=False)
    with pytest.raises(DataError, match="nothing unsafe"):
        fit_parts(clip, Parts(*(part(60, seed, 0, 0) for seed in (1, 2, 3))), 20, progress=False)


@pytest.fixture(scope="module")
def clip(weights):
    return sf.load_clip("ViT-tiny-8-32", str(weights))


# --- the file


def test_a_guard_comes_back_as_it_was(run, guard, clip, tmp_path):
    copy = shutil.copy(run / "guard.safetensors", tmp_path / "mine.safetensors")
    embeddings = torch.randn(5, guard.text.mean.shape[0], generator=torch.Generator().manual_seed(0))
    for again in (sf.load_guard(run), sf.load_guard(copy, frozen=clip)):
        for name in ("text", "image"):
            p = getattr(again, name)(embeddings)
            assert (
                p.shape == (5,) and torch.equal(p, getattr(guard, name)(embeddings)) and (p > 0).all() and (p < 1).all()
            )
        assert again.figures == guard.figures == json.loads((run / "guard.json").read_text())
    for scale in (9, 1e-30, 1e30, 1e300):
        scaled = scale * (embeddings.double() if scale > 1e38 else embeddings)
        assert torch.allclose(guard.text(scaled), guard.text(embeddings), atol=1e-5), "the scale says nothing"


def test_strings_and_images_go_through_the_frozen_model(guard, clip):
    texts, pictures = ["a red circle", "a gun"], [Image.new("RGB", (40, 30), (i, 90, 30)) for i in range(3)]
    direct = clip.encode_text(clip.tokenizer(texts)), clip.encode_image(torch.stack([*map(clip.preprocess, pictures)]))
    torch.testing.assert_close(guard.of_texts(texts), guard.text(direct[0]), atol=1e-5, rtol=0)
    assert torch.equal(guard.of_texts(texts[1]), guard.of_texts(texts[1:]))
    assert torch.equal(guard.of_images(pictures[1]), guard.of_images(pictures[1:2]))
    assert guard.of_texts([]).shape == guard.of_images([]).shape == (0,)
    torch.testing.assert_close(guard.of_images(pictures), guard.image(direct[1]), atol=1e-5, rtol=0)


def test_another_frozen_model_is_refused(run, guard, clip, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights
        torch.manual_seed(8)
        other = sf.load_clip("ViT-tiny-8-32")
    with pytest.raises(GuardError, match="what differs: weights or architecture"):
        sf.load_guard(run, frozen=other)
    with pytest.raises(GuardError, match="what differs"):
        sf.load_guard(run, frozen=sf.load(run))
    tokens = clip.tokenizer
    try:
        clip.tokenizer = lambda texts: tokens([text.upper()[::-1] for text in texts])
        with pytest.raises(GuardError, match="what differs: tokenizer"):
            sf.load_guard(run, frozen=clip)
    finally:
        clip.tokenizer = tokens


def test_files_that_are_no_guard_are_refused(run, guard, clip, tmp_path):
    content = (run / "guard.safetensors").read_bytes()
    for name, damaged in (("cut", content[: len(content) // 2]), ("empty", b"")):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(GuardError, match=f"{name} is no guard, or is damaged"):
            sf.load_guard(tmp_path / name, frozen=clip)
    with pytest.raises(GuardError, match=r"its format is not saferclip_fast\.guard"):
        sf.load_guard(run / "final" / "open_clip_model.safetensors", frozen=clip)
    with pytest.raises(FileNotFoundError, match="fit one with saferclip guard RUN"):
        sf.load_guard(tmp_path)
    with pytest.raises(ValueError, match="name it, frozen=MODEL"):
        sf.load_guard(run / "guard.safetensors")


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (torch.randn(3, 5), "has d=5 but the text guard has d="),
        (torch.randn(5), r"must have shape \[rows, d\]"),
        (torch.full((3, 64), float("nan")), "NaN or Inf"),
        (torch.zeros(3, 64), "row 0 is all zeros and has no direction"),
    ],
)
def test_embeddings_that_nothing_can_be_said_of_are_refused(guard, embeddings, message):
    if embeddings.isnan().any() or not embeddings.any():
        embeddings = embeddings[:, :1].expand(-1, guard.text.mean.shape[0])
    with pytest.raises(ValueError, match=message):
        guard.text(embeddings)


# --- the command


def test_the_command_writes_a_guard_with_its_figures(run, guard, capsys):
    before = load_file(run / "guard.safetensors")
    words = [str(run), "--quiet", "--device", "cpu"]
    assert main([*words, "--data", "scenes:n=40,size=32,split=test,mixed=0.5", "--seed", "1"]) == 0
    shown, found = capsys.readouterr().out, json.loads((run / "guard.json").read_text())
    assert "area under ROC" in shown and str(run / "guard.safetensors") in shown and "reliability" in shown
    assert [found["data"][name]["rows"] for name in ("train", "validation", "test")] == [72, 24, 40]
    assert 0 < found["modalities"]["image"]["unsafe"] < 40, "mixed rows have labels"
    other = load_file(run / "guard.safetensors")
    sf.fit_guard(run, samples=50, progress=False)
    again = load_file(run / "guard.safetensors")
    assert before.keys() == again.keys() and all(torch.equal(x, again[name]) for name, x in before.items())
    assert any(not torch.equal(x, other[name]) for name, x in before.items() if name in other)
    halves = json.loads((run / "guard.json").read_text())["data"]
    assert [halves[name]["rows"] for name in ("train", "validation", "test")] == [72, 12, 12]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.val_fraction=0"], "held no rows out"),
        (["objective.k=3"], "only data.* options"),
        (["--data", "scenes:n=9,size=32,what=1"], "what"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--device", "tpu9"], "device='tpu9'"),
    ],
)
def test_a_mistake_is_one_line(run, capsys, words, message):
    assert main([str(run), "--quiet", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
