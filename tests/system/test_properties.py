"""Properties that hold whatever the values, of everything public: saferclip_fast.__all__, and readers of outside text.

What each op computes is compared with float64 in tests/ops; here, what must follow from it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import saferclip_fast as sf
from saferclip_fast import config
from saferclip_fast.data.images import ImageError, decode, resolve_inside
from saferclip_fast.data.open import parse_options
from saferclip_fast.evaluate.bootstrap import average, resample
from saferclip_fast.models import dial
from saferclip_fast.ops.choice import select
from saferclip_fast.runtime.ranks import split

FEW = settings(max_examples=25)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
widths, seeds = st.integers(2, 40), st.integers(0, 2**31)
usable = st.sampled_from([name for name, row in sf.backends().items() if row.usable and name != "triton"])


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bank_of(rows: int, d: int, seed: int) -> sf.SafeBank:
    return sf.SafeBank(*randn(2, rows, d, seed=seed))


@st.composite
def searches(draw) -> tuple[torch.Tensor, sf.SafeBank, int]:
    """Queries, a bank, k."""
    rows, d, seed = draw(st.integers(1, 90)), draw(widths), draw(seeds)
    return (
        randn(draw(st.integers(1, 20)), d, seed=seed + 1),
        bank_of(rows, d, seed),
        draw(st.integers(1, min(rows, 12))),
    )


@st.composite
def batches(draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """text, image (which want gradients), frozen_text, frozen_image [B, d]."""
    text, image, *frozen = randn(4, draw(st.integers(1, 17)), draw(widths), seed=draw(seeds)).unbind()
    return text.requires_grad_(), image.requires_grad_(), *frozen


# --- nearest_safe -------------------------------------------------------------------------------


@FEW
@given(searches(), st.sampled_from([2.0**-20, 0.25, 2.0, 2.0**20]), usable)
def test_the_scale_of_a_query_does_not_matter(search, scale, backend):
    query, bank, k = search
    found = sf.nearest_safe(query, bank, k, backend=backend)
    scaled = sf.nearest_safe(query * scale, bank, k, backend=backend)
    assert torch.equal(found.indices, scaled.indices) and torch.equal(found.scores, scaled.scores)


@FEW
@given(searches())
def test_fewer_neighbors_are_the_first_of_more(search):
    query, bank, k = search
    most, fewer = sf.nearest_safe(query, bank, len(bank)), sf.nearest_safe(query, bank, k)
    assert torch.equal(most.scores[:, :k], fewer.scores) and torch.equal(most.indices[:, :k], fewer.indices)
    assert (most.indices.sort(1).values == torch.arange(len(bank))).all()


@FEW
@given(searches(), seeds)
def test_the_order_of_the_bank_and_of_the_queries_does_not_matter(search, seed):
    query, bank, k = search
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(bank), generator=generator)
    order = torch.randperm(len(query), generator=generator)
    found, shuffled = sf.nearest_safe(query, bank, k), sf.nearest_safe(query[order], bank.select(rows), k)
    assert torch.equal(shuffled.scores, found.scores[order])
    scores = (normalize(query[order]).double() @ bank.text.T.double()).gather(1, rows[shuffled.indices])
    torch.testing.assert_close(scores.float(), shuffled.scores, rtol=0, atol=1e-6)


@FEW
@given(searches(), st.integers(1, 6), st.booleans())
def test_the_best_of_the_slices_is_the_best_of_the_bank(search, world, packed):
    query, bank, _ = search
    world = min(world, len(bank))
    whole = sf.nearest_safe(query, bank, 1)
    if packed:
        bank.pack()
    parts = [(shard, sf.nearest_safe(query, shard, 1)) for shard in (bank.shard(rank, world) for rank in range(world))]
    scores = torch.cat([found.scores for _, found in parts], 1)
    indices = torch.cat([found.indices + shard.offset for shard, found in parts], 1)
    assert torch.equal(scores.max(1).values, whole.scores[:, 0])
    assert torch.equal(indices.gather(1, scores.argmax(1, keepdim=True)), whole.indices)


# --- the losses ---------------------------------------------------------------------------------


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return [g.double() for g in torch.autograd.grad(loss, inputs)]


def assert_gradients_lie_across_rows(loss, *inputs):
    """The length of a row does not enter the loss, so no gradient points along it."""
    for x, g in zip(inputs, gradients(loss, *inputs), strict=True):
        along = (x.detach().double() * g).sum(1)
        assert (along.abs() <= 1e-5 * x.detach().double().norm(dim=1) * (g.norm(dim=1) + 1e-2)).all()


term_weights = st.lists(st.floats(0, 8, width=16), min_size=4, max_size=4)


@FEW
@given(batches(), term_weights, usable, st.integers(1, 4), st.sampled_from(["frozen", "current"]))
def test_retarget_loss_is_the_weighted_sum_of_its_terms(batch, weights, backend, k, negative):
    bank = bank_of(9, batch[0].shape[1], 3)
    out = sf.retarget_loss(*batch, bank, k, backend=backend, negative=negative, weights=named(weights, "uni", "cross"))
    assert list(out.terms) == list(named(weights, "uni", "cross"))
    expected = sum(w * term.double() for w, term in zip(weights, out.terms.values(), strict=True))
    torch.testing.assert_close(out.loss.double(), torch.as_tensor(expected).double(), rtol=1e-5, atol=1e-6)
    assert all(0 <= float(out.terms[f"uni_{m}"]) <= 2.0001 for m in ("text", "image"))
    assert_gradients_lie_across_rows(out.loss, *batch[:2])


@FEW
@given(batches(), term_weights, usable, st.sampled_from([1.0, 100.0]))
def test_preservation_loss_is_the_weighted_sum_of_its_terms(batch, weights, backend, scale):
    weights = [w or 1.0 for w in weights]  # a term of weight 0 is not computed
    out = sf.preservation_loss(*batch, backend=backend, logit_scale=scale, weights=named(weights, "cos", "nce"))
    expected = sum(w * term.double() for w, term in zip(weights, out.terms.values(), strict=True))
    torch.testing.assert_close(out.loss.double(), torch.as_tensor(expected).double(), rtol=1e-5, atol=1e-5)
    assert all(float(term) >= -1e-5 for term in out.terms.values())
    assert_gradients_lie_across_rows(out.loss, *batch[:2])


@FEW
@given(batches(), usable, st.sampled_from([1.0, 10.0]), st.data())  # at 100, float32 alone moves a gradient by 1e-4
def test_info_nce_of_chosen_rows_is_that_of_the_rows_alone(batch, backend, scale, data):
    x, y = batch[:2]
    rows = len(x)
    mask = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=rows, max_size=rows)))
    loss = sf.info_nce(x, y, mask=mask, logit_scale=scale, backend=backend)
    assert float(loss) >= -1e-5
    found = gradients(loss, x, y)
    assert not any(g[mask == 0].any() for g in found)
    if mask.any():
        kept = [side.detach()[mask == 1].requires_grad_() for side in (x, y)]
        alone = sf.info_nce(*kept, logit_scale=scale, backend=backend)
        torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-5)
        for g, h in zip(found, gradients(alone, *kept), strict=True):
            torch.testing.assert_close(g[mask == 1], h, rtol=1e-3, atol=1e-5)


def named(weights: list[float], first: str, second: str) -> dict[str, float]:
    return dict(zip((f"{first}_text", f"{first}_image", f"{second}_text", f"{second}_image"), weights, strict=True))


@FEW
@given(batches(), seeds)
def test_the_order_of_a_batch_does_not_matter(batch, seed):
    order = torch.randperm(len(batch[0]), generator=torch.Generator().manual_seed(seed))
    shuffled = [x.detach()[order].requires_grad_(x.requires_grad) for x in batch]
    bank = bank_of(7, batch[0].shape[1], 5)
    for loss in (lambda *b: sf.retarget_loss(*b, bank, 2).loss, lambda *b: sf.preservation_loss(*b).loss):
        one, other = loss(*batch), loss(*shuffled)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        for g, h in zip(gradients(one, *batch[:2]), gradients(other, *shuffled[:2]), strict=True):
            torch.testing.assert_close(g[order], h, rtol=1e-3, atol=1e-5)


@FEW
@given(batches())
def test_a_model_that_did_not_move_has_no_cosine_loss(batch):
    frozen = batch[2:]
    terms = sf.preservation_loss(*frozen, *frozen).terms
    assert abs(float(terms["cos_text"])) < 1e-5 and abs(float(terms["cos_image"])) < 1e-5


@FEW
@given(batches(), st.data())
def test_rows_labeled_safe_are_not_redirected(batch, data):
    rows = len(batch[0])
    labels = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=rows, max_size=rows)))
    bank = bank_of(6, batch[0].shape[1], 1)
    out = sf.retarget_loss(*batch, bank, text_is_unsafe=labels, image_is_unsafe=labels)
    for g in gradients(out.loss, *batch[:2]):
        assert not g[labels == 0].any()
    if labels.any():
        kept = [x.detach()[labels == 1] for x in batch]
        torch.testing.assert_close(out.loss.detach(), sf.retarget_loss(*kept, bank).loss, rtol=1e-5, atol=1e-6)


@FEW
@given(batches(), st.integers(1, 16))
def test_shares_of_a_batch_add_up_to_it(batch, cut):
    rows, bank = len(batch[0]), bank_of(6, batch[0].shape[1], 2)
    whole = sf.retarget_loss(*batch, bank)
    counts = torch.full((4,), rows)
    parts = [part for part in (slice(0, cut), slice(cut, rows)) if len(batch[0][part])]
    shares = [sf.retarget_loss(*(x[part] for x in batch), bank, counts=counts).loss for part in parts]
    torch.testing.assert_close(sum(shares), whole.loss, rtol=1e-5, atol=1e-6)


@FEW
@given(batches(), st.integers(1, 5), usable)
def test_a_search_done_earlier_gives_the_same_loss(batch, k, backend):
    bank = bank_of(11, batch[0].shape[1], 8)
    neighbors = sf.nearest_safe(batch[2], bank, k, backend=backend)
    searched = sf.retarget_loss(*batch, bank, k, backend=backend)
    given_ = sf.retarget_loss(*batch, bank, neighbors=neighbors, backend=backend)
    assert torch.equal(searched.neighbors.indices, neighbors.indices) and torch.equal(searched.loss, given_.loss)


@FEW
@given(batches(), st.integers(0, 3), st.data(), st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_a_value_that_is_no_number_is_named_wherever_it_stands(batch, which, data, value):
    row, column = (data.draw(st.integers(0, size - 1)) for size in batch[0].shape)
    broken = [x.detach().clone() for x in batch]
    broken[which][row, column] = value
    name = ("text", "image", "frozen_text", "frozen_image")[which]
    bank = bank_of(4, batch[0].shape[1], 1)
    for loss in (lambda *b: sf.retarget_loss(*b, bank), sf.preservation_loss):
        # retarget_loss leaves frozen_text to its search, which calls it query
        with pytest.raises(ValueError, match=f"({name}|query) holds NaN or Inf, first in row {row} "):
            loss(*broken)


# --- SafeBank, backends, use_backend --------------------------------------------------------------


@settings(max_examples=10)  # each syncs two files to the disk
@given(st.integers(1, 40), widths, seeds, st.sampled_from(DTYPES), st.booleans())
def test_a_bank_file_gives_back_the_bank(rows, d, seed, dtype, packed):
    bank = sf.SafeBank(*randn(2, rows, d, seed=seed).to(dtype), {"model": "m", "seed": str(seed)})
    if packed:
        bank.pack()
    with tempfile.TemporaryDirectory() as folder:
        bank.save(Path(folder, "bank"))
        loaded = sf.SafeBank.load(Path(folder, "bank"), expect=bank.metadata)
        for name in ("text", "image", "packed"):
            mine, its = getattr(bank, name), getattr(loaded, name)
            assert (mine is None) == (its is None) and (mine is None or torch.equal(mine, its))
        assert loaded.metadata == bank.metadata and len(loaded) == rows and loaded.width == d
        built = sf.SafeBank.build(Path(folder, "built"), bank.text, bank.image)
        again = sf.SafeBank(bank.text.float(), bank.image.float())
        assert torch.equal(built.text, again.text) and torch.equal(built.image, again.image)
        torch.testing.assert_close(built.text.norm(dim=1), torch.ones(rows), rtol=1e-6, atol=0)


@FEW
@given(st.integers(1, 40), widths, seeds, st.data())
def test_slices_and_selections_hold_the_rows_they_say(rows, d, seed, data):
    bank = bank_of(rows, d, seed)
    torch.testing.assert_close(bank.text.norm(dim=1), torch.ones(rows))
    world = data.draw(st.integers(1, rows))
    shards = [bank.shard(rank, world) for rank in range(world)]
    assert torch.equal(torch.cat([shard.image for shard in shards]), bank.image)
    assert [shard.offset for shard in shards] == [split(rows, rank, world).start for rank in range(world)]
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), max_size=9)), dtype=torch.int64)
    assert torch.equal(bank.select(chosen).text, bank.text[chosen])
    scaled = sf.SafeBank(bank.text * 8, bank.image * 0.5)
    torch.testing.assert_close(scaled.text, bank.text, rtol=1e-6, atol=1e-7)


@FEW
@given(usable, st.booleans())
def test_a_forced_backend_is_taken_inside_alone_and_counts_as_named(backend, raises):
    query, bank = randn(3, 8, seed=1), bank_of(20, 8, 2)
    call = ("nearest_safe", "auto", "cpu", torch.float32, 60)
    before, kernel = sf.nearest_safe(query, bank, 2), select(*call)
    with pytest.raises(KeyError) if raises else tempfile.TemporaryDirectory(), sf.use_backend(backend):
        forced = sf.nearest_safe(query, bank, 2)
        assert select(*call) == select("nearest_safe", backend, *call[2:])
        assert any("forced" in line for line in sf.backends()[backend].picked)
        if raises:
            raise KeyError
    assert select(*call) == kernel
    named_ = sf.nearest_safe(query, bank, 2, backend=backend)
    after = sf.nearest_safe(query, bank, 2)
    assert all(torch.equal(a, b) for a, b in zip(forced, named_, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_backends_say_why():
    for row in sf.backends().values():
        assert row.detail and (row.ops or not row.usable)


def test_everything_public_is_here():
    """A name that is exported, but in no test of this file, has no property tested."""
    text = Path(__file__).read_text()
    results = ("Backend", "BackendError", "Neighbors", "PreservationOutput", "RetargetOutput", "__version__")
    # these train or need a model, and are tested with a few in tests/api
    elsewhere = ("ClipModel", "FineTuned", "evaluate", "export", "fine_tune", "load", "load_clip")
    elsewhere += ("Guard", "describe", "fit_guard", "generate", "load_guard", "restore")  # in folders of their own
    elsewhere += ("GatedModel", "gate", "load_gate", "patch")
    for name in sf.__all__:
        assert name in results + elsewhere or f"sf.{name}" in text, name


# --- figures --------------------------------------------------------------------------------------


@FEW
@given(st.lists(st.floats(-9, 9), min_size=1, max_size=30), st.floats(-3, 3), st.floats(-5, 5), seeds)
def test_an_interval_moves_with_its_values_and_pairs_cancel(values, scale, shift, seed):
    vector = torch.tensor(values, dtype=torch.float64)
    drawn = resample({"a": vector, "b": scale * vector + shift}, 200, seed)
    torch.testing.assert_close(drawn["b"].means, scale * drawn["a"].means + shift, rtol=1e-9, atol=1e-9)
    assert min(values) - 1e-9 <= drawn["a"].interval()["low"] <= drawn["a"].interval()["high"] <= max(values) + 1e-9
    assert (drawn["a"] - drawn["a"]).interval() == {"value": 0, "low": 0, "high": 0}
    assert average([drawn["a"], drawn["a"]]).interval() == pytest.approx(drawn["a"].interval())


@FEW
@given(seeds, st.floats(0, 1.5))
def test_the_dial_goes_straight_from_end_to_end(seed, alpha):
    frozen, tuned = ({"w": randn(3, 4, seed=seed + i).double()} for i in range(2))
    mixed = dial.interpolate(frozen, tuned, alpha)["w"]
    torch.testing.assert_close(mixed, frozen["w"] + alpha * (tuned["w"] - frozen["w"]))


# --- text from outside ------------------------------------------------------------------------------


parts = st.sampled_from(["a", "b.png", "..", ".", "", "~", "C:", "a b", "\\", "%2e%2e", "…", "\0"])


@settings(max_examples=200)
@given(st.lists(parts, max_size=8).map("/".join))
@example("a/../../secret.png")
@example("/etc/hostname")
def test_no_written_path_leaves_its_folder(name):
    with tempfile.TemporaryDirectory() as outside:
        root = Path(outside, "root")
        (root / "a").mkdir(parents=True)
        for file in (Path(outside, "secret.png"), root / "b.png", root / "a" / "b.png"):
            file.write_bytes(b"x")
        try:
            found = resolve_inside(root, name)
        except ImageError as error:
            assert error.kind in ("bad path", "missing image")
        else:
            assert os.path.commonpath([os.path.realpath(found), os.path.realpath(root)]) == os.path.realpath(root)


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_bytes_are_an_image_or_a_named_error(data):
    try:
        assert decode(data, "the image", 10_000).mode == "RGB"
    except ImageError as error:
        assert "the image" in str(error)


words = st.text(st.characters(exclude_characters=",= \t\r\n", exclude_categories=["C", "Z"]), min_size=1, max_size=8)


@FEW
@given(st.dictionaries(words, st.integers() | st.booleans() | st.floats(allow_nan=False)))
def test_options_of_a_source_are_read_as_written(options):
    written = ",".join(
        f"{name}={str(value).lower() if value in (True, False) and isinstance(value, bool) else value}"
        for name, value in options.items()
    )
    assert parse_options(written) == options


@FEW
@given(st.data())
def test_a_config_written_as_words_is_read_back(data):
    numbers = [o for o in config.options() if o.kind in ("int", "float") and o.low is not None]
    chosen = data.draw(st.lists(st.sampled_from(numbers), max_size=5, unique_by=lambda o: o.key))
    values = {}
    for o in chosen:
        high = o.high if o.high is not None else o.low + 1000
        pick = st.integers(int(o.low), int(high)) if o.kind == "int" else st.floats(o.low, high)
        values[o.key] = data.draw(pick)
    flat = config.flatten(config.load_config(None, [f"{key}={value!r}" for key, value in values.items()]))
    assert {key: flat[key] for key in values} == values
    defaults = config.flatten(config.Config())
    assert all(flat[key] == defaults[key] for key in flat if key not in values)


@FEW
@given(st.integers(0, 300), st.integers(1, 9))
def test_ranks_share_every_row_once(rows, world):
    shares = [split(rows, rank, world) for rank in range(world)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
