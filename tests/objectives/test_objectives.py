"""The objectives: their terms against the formulas, labels, and what they refuse."""

import math

import numpy as np
import pytest
import torch

from saferclip_fast import SafeBank, nearest_safe, preservation_loss, retarget_loss
from saferclip_fast.data.quadruplets import QuadrupletEmbeddings
from saferclip_fast.objectives import DEFAULT_WEIGHTS, SafeClip, SaferClip, ShieldClip
from saferclip_fast.objectives.rank_guard import rank_guard, rank_guards

B, D = 6, 16


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)

    def rows(count=B):
        return torch.randn(count, D, generator=generator, dtype=torch.float64)

    current = QuadrupletEmbeddings(*(rows().requires_grad_() for _ in range(4)))
    frozen = QuadrupletEmbeddings(*(rows() for _ in range(4)))
    return current, frozen, SafeBank(rows(30), rows(30))


def attached(objective, bank):
    objective.attach(bank)
    return objective


def test_loss_is_the_weighted_sum_of_the_ops(batch):
    current, frozen, bank = batch
    objective = SaferClip({"uni_text": 3.0, "nce_image": 0.7}, k=3, tau=0.1, beta=2.0, margin=0.1, negative="frozen")
    out = attached(objective, bank)(*batch)
    redirect = retarget_loss(*current[2:], *frozen[2:], bank, 3, tau=0.1, beta=2.0, margin=0.1)
    preserve = preservation_loss(*current[:2], *frozen[:2])
    assert out.terms == redirect.terms | preserve.terms | {"rank_guard": out.terms["rank_guard"]}
    weights = {**DEFAULT_WEIGHTS, "uni_text": 3.0, "nce_image": 0.7}
    torch.testing.assert_close(out.loss.detach(), sum(weights[name] * term for name, term in out.terms.items()))


def test_offline_neighbors_equal_in_step_search(batch):
    current, frozen, bank = batch
    objective = attached(SaferClip(k=2), bank)
    found = nearest_safe(frozen.unsafe_text, bank, 2)
    assert torch.equal(objective(*batch).loss, objective(*batch, neighbors=found).loss)


def test_rows_labeled_safe_are_kept_not_redirected(batch):
    current, frozen, bank = batch
    labels = torch.tensor([1, 0, 1, 0, 1, 1])
    only_redirect = SaferClip(dict.fromkeys(DEFAULT_WEIGHTS, 0.0) | {"uni_text": 1.0, "cross_text": 1.0})
    out = only_redirect(*batch, text_is_unsafe=labels)
    assert not torch.autograd.grad(out.loss, current.unsafe_text)[0][labels == 0].any()
    keeps = SaferClip(dict.fromkeys(DEFAULT_WEIGHTS, 0.0) | {"cos_text": 1.0})
    out = keeps(*batch, text_is_unsafe=labels)
    expected = 1 - torch.cosine_similarity(current.unsafe_text, frozen.unsafe_text)[labels == 0]
    torch.testing.assert_close(out.terms["kept_text"].double(), expected.mean().detach(), rtol=1e-6, atol=1e-6)
    grad = torch.autograd.grad(out.loss, current.unsafe_text)[0]
    assert grad[labels == 0].any(1).all() and not grad[labels == 1].any()


def test_a_label_between_0_and_1_counts_by_how_sure_it_is(batch):
    current, frozen, bank = batch
    v_t, v_v = torch.tensor([1, 0.25, 0, 0.5, 0.9, 1]), torch.tensor([0.5, 1, 1, 0.25, 0, 0.7])
    objective = attached(SaferClip(k=1, page=0.1, guard_k=3, negative="frozen"), bank)
    out = objective(*batch, None, v_t, v_v)
    alone = [attached(SaferClip(k=1, page=0.1, guard_k=3, negative="frozen"), bank) for _ in range(B)]
    rows = [
        {name: float(value) for name, value in each(*_row(batch, i), None, *NONE_SAFE).terms.items()}
        for i, each in enumerate(alone)
    ]
    v_t, v_v = (v.double() for v in (v_t, v_v))
    (w_t, s_t), (w_v, s_v) = ((torch.relu(2 * v - 1), torch.relu(1 - 2 * v)) for v in (v_t, v_v))
    of_term = {"uni_text": w_t, "uni_image": w_v, "cross_text": w_t * w_v, "cross_image": w_t * w_v}
    for name, weight in of_term.items():
        expected = sum(float(w) * row[name] for w, row in zip(weight, rows, strict=True)) / max(
            1.0, float(weight.sum())
        )
        assert float(out.terms[name]) == pytest.approx(expected, rel=1e-5), name
    for name, v, x, anchor in (
        ("kept_text", s_t, current.unsafe_text, frozen.unsafe_text),
        ("kept_image", s_v, current.unsafe_image, frozen.unsafe_image),
    ):
        distance = 1 - torch.cosine_similarity(x, anchor).detach()
        assert float(out.terms[name]) == pytest.approx(float((v * distance).sum() / v.sum()), rel=1e-5)
    guards = rank_guards(bank, 0.1)
    of_rows = [
        rank_guard(x.detach(), g, 3, 0.0, torch.ones(B)).values for x, g in zip(current[2:], guards, strict=True)
    ]
    expected = sum(float((v * values).sum() / v.sum()) for v, values in zip((w_t, w_v), of_rows, strict=True))
    assert float(out.terms["rank_guard"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective", [SaferClip, SafeClip, ShieldClip])
@pytest.mark.parametrize("label", [-3.0, 5.0, math.nan])
def test_checked_labels_outside_0_and_1_are_refused_as_they_were_given(batch, objective, label):
    labels = torch.ones(B)
    labels[2] = label
    with pytest.raises(ValueError, match=rf"image_is_unsafe must lie between 0 .*, but row 2 has {label:g}"):
        objective(check=True)(*batch, image_is_unsafe=labels)


NONE_SAFE = torch.ones(1), torch.ones(1)


def _row(batch, i):
    """Sample i as a batch of its own, in the same bank."""
    current, frozen, bank = batch
    return *(type(current)(*(x[i : i + 1] for x in columns)) for columns in (current, frozen)), bank


def test_labels_whose_weights_are_small_do_not_blow_a_row_up(batch):
    small = torch.full((B,), 0.50005)
    objective = SaferClip(dict.fromkeys(DEFAULT_WEIGHTS, 0.0) | {"uni_text": 1.0})
    whole, part = objective(*batch), objective(*batch, text_is_unsafe=small)
    assert float(part.terms["uni_text"]) == pytest.approx(1e-4 * B * float(whole.terms["uni_text"]), rel=1e-2)


@pytest.mark.parametrize("labels", [(None, None), (torch.tensor([1, 0, 1, 0, 1, 1]), torch.tensor([1, 1, 0, 0, 0, 1]))])
def test_rank_guard_is_a_mean_over_the_redirected_rows_of_each_modality(batch, labels):
    current, _, bank = batch
    objective = attached(SaferClip(page=0.1, guard_k=3, guard_margin=0.05), bank)
    out = objective(*batch, None, *labels)
    expected = 0.0
    for x, guard, unsafe in zip(current[2:], rank_guards(bank, 0.1), labels, strict=True):
        values = rank_guard(x.detach(), guard, 3, 0.05, torch.ones(B)).values
        expected += float(values.mean() if unsafe is None else values[unsafe == 1].mean())
    assert expected > 0 and float(out.terms["rank_guard"]) == pytest.approx(expected, rel=1e-6)


def test_without_its_weight_there_is_no_rank_guard_and_nothing_to_attach(batch):
    assert "rank_guard" not in SaferClip({"rank_guard": 0.0})(*batch).terms
    with pytest.raises(ValueError, match=r"call attach\(bank\) once"):
        SaferClip()(*batch)


# Transcriptions of the papers' formulas, row by row in numpy float64: nothing is shared with the code under test.


def cos(a, b):
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def distance(x, y, rows):
    return sum(1 - cos(x[i], y[i]) for i in rows) / len(rows) if rows else 0.0


def nce(x, y, rows, scale=100.0):
    """Symmetric InfoNCE of x[rows] against y[rows]."""
    total = 0.0
    for i in rows:
        for logits in ([scale * cos(x[i], y[j]) for j in rows], [scale * cos(x[j], y[i]) for j in rows]):
            top = max(logits)
            log_sum = top + math.log(sum(math.exp(logit - top) for logit in logits))
            total += (log_sum - scale * cos(x[i], y[i])) / 2
    return total / len(rows) if rows else 0.0


def arrays(embeddings):
    return [rows.detach().numpy() for rows in embeddings]


SAFECLIP_ORDER = ("text_safe", "text_nsfw", "vision_safe", "vision_nsfw", "S_Vref", "U_Vref", "V_Sref", "G_Sref")
SAFECLIP_WEIGHTS = (0.1, 0.1, 0.1, 0.2, 0.25, 0.25, 0.25, 0.5)


def safeclip_terms(current, frozen, f_t, f_v, pair=None):
    (t, v, t_star, v_star), (t0, v0, t0_star, v0_star) = arrays(current), arrays(frozen)
    target_t, target_v = (t0, v0) if pair is None else pair
    everything = list(range(len(t)))
    unsafe_t, unsafe_v = np.flatnonzero(f_t).tolist(), np.flatnonzero(f_v).tolist()
    return {
        "text_safe": distance(t, t0, everything),
        "text_nsfw": distance(t_star, target_t, unsafe_t),
        "vision_safe": distance(v, v0, everything),
        "vision_nsfw": distance(v_star, target_v, unsafe_v),
        "S_Vref": nce(t, v0, everything),
        "U_Vref": nce(t_star, target_v, unsafe_t),
        "V_Sref": nce(v, t0, everything),
        "G_Sref": nce(v_star, target_t, unsafe_v),
        "kept_text": distance(t_star, t0_star, np.flatnonzero(f_t == 0).tolist()),
        "kept_image": distance(v_star, v0_star, np.flatnonzero(f_v == 0).tolist()),
    }


def shieldclip_terms(current, frozen, f_t, f_v):
    (t, v, t_star, v_star), (t0, v0, t0_star, v0_star) = arrays(current), arrays(frozen)

    def rows(text, image):  # None: any label
        return [i for i in range(len(t)) if (text is None or f_t[i] == text) and (image is None or f_v[i] == image)]

    def both(x, y, rows):  # equation 4: the sum of both directions, where `nce` is their mean
        return 2 * nce(x, y, rows)

    return {
        "real": distance(t, t0, rows(None, None))
        + distance(v, v0, rows(None, None))
        + both(t, v0, rows(None, None))
        + both(v, t0, rows(None, None)),
        "safe": distance(t_star, t0_star, rows(0, None))
        + distance(v_star, v0_star, rows(None, 0))
        + both(t_star, v0_star, rows(0, 0))
        + both(v_star, t0_star, rows(0, 0)),
        "redirect": distance(t_star, t0, rows(1, None)) + distance(v_star, v0, rows(None, 1)),
        "mix": both(t_star, v0_star, rows(1, 0)) + both(v_star, t0_star, rows(0, 1)),
        "coherence": both(v_star, t_star, rows(1, 1)),
    }


LABELS = {
    "unlabeled": (None, None),
    "mixed": (torch.tensor([1, 1, 0, 0, 1, 0, 1, 0, 1, 1, 0, 0]), torch.tensor([1, 0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0])),
    "all safe": (torch.zeros(12, dtype=torch.int64),) * 2,
}


@pytest.fixture
def twelve():
    """Twelve quadruplets, which hold every combination of labels twice or more."""
    generator = torch.Generator().manual_seed(1)
    rows = lambda: 3 * torch.randn(12, D, generator=generator, dtype=torch.float64)  # noqa: E731
    current = QuadrupletEmbeddings(*(rows().requires_grad_() for _ in range(4)))
    return current, QuadrupletEmbeddings(*(rows() for _ in range(4))), SafeBank(rows(), rows())


def as_arrays(labels):
    return [np.ones(12) if label is None else label.numpy() for label in labels]


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_safeclip_equals_a_transcription(twelve, labels):
    current, frozen, _ = twelve
    out = SafeClip()(*twelve, text_is_unsafe=labels[0], image_is_unsafe=labels[1])
    expected = safeclip_terms(current, frozen, *as_arrays(labels))
    assert set(SAFECLIP_ORDER) <= set(out.terms) <= set(expected)
    for name, term in out.terms.items():
        assert float(term) == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name
    weights = dict(zip(SAFECLIP_ORDER, SAFECLIP_WEIGHTS, strict=True))
    kept = 0.1 * expected["kept_text"] + 0.1 * expected["kept_image"]
    total = (sum(weights[name] * expected[name] for name in weights) + kept) / sum(SAFECLIP_WEIGHTS) / 8
    assert float(out.loss.detach()) == pytest.approx(total, rel=1e-6)


def test_safeclip_towards_the_nearest_pair(twelve):
    current, frozen, bank = twelve
    text, image = bank.text.numpy(), bank.image.numpy()
    best = [max(range(12), key=lambda j, row=row: cos(row, text[j])) for row in frozen.unsafe_text.numpy()]
    expected = safeclip_terms(current, frozen, np.ones(12), np.ones(12), pair=(text[best], image[best]))
    out = SafeClip(targets="nearest")(*twelve)
    for name in SAFECLIP_ORDER:
        assert float(out.terms[name]) == pytest.approx(expected[name], rel=1e-6), name
    found = nearest_safe(frozen.unsafe_text, bank, 3)
    assert torch.equal(SafeClip(targets="nearest")(*twelve, neighbors=found).loss, out.loss), "found before training"


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_shieldclip_equals_a_transcription(twelve, labels):
    current, frozen, _ = twelve
    out = ShieldClip()(*twelve, text_is_unsafe=labels[0], image_is_unsafe=labels[1])
    expected = shieldclip_terms(current, frozen, *as_arrays(labels))
    assert set(out.terms) == set(expected)
    for name, term in out.terms.items():
        assert float(term) == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name
    weights = {"real": 0.1, "safe": 0.1, "redirect": 0.1, "mix": 0.25, "coherence": 0.25}
    assert float(out.loss.detach()) == pytest.approx(sum(weights[name] * expected[name] for name in weights), rel=1e-6)


def test_shieldclip_teaches_the_unsafe_side_of_a_mixed_pair_alone(twelve):
    current = twelve[0]
    only_mix = ShieldClip({"real": 0, "safe": 0, "redirect": 0, "coherence": 0})
    f_t, f_v = LABELS["mixed"]
    loss = only_mix(*twelve, text_is_unsafe=f_t, image_is_unsafe=f_v).loss
    text, image = torch.autograd.grad(loss, [current.unsafe_text, current.unsafe_image])
    assert torch.equal(text.any(1), (f_t == 1) & (f_v == 0))
    assert torch.equal(image.any(1), (f_t == 0) & (f_v == 1))


@pytest.mark.parametrize("objective", [SafeClip, ShieldClip, SaferClip])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_gradients_are_those_of_the_loss(twelve, objective, labels):
    """A step against the gradient changes the loss as a finite difference says; negative=frozen stops no gradient."""
    current, frozen, bank = twelve
    options = {"negative": "frozen", "k": 3} if objective is SaferClip else {}
    module = attached(objective(logit_scale=5.0, **options), bank)

    def loss(rows):
        return module(QuadrupletEmbeddings(*rows), frozen, bank, None, *labels).loss

    grads = torch.autograd.grad(loss(current), current)
    assert all(torch.isfinite(grad).all() for grad in grads)
    generator = torch.Generator().manual_seed(2)
    for side, grad in enumerate(grads):
        way, eps = torch.randn(grad.shape, generator=generator, dtype=torch.float64), 1e-4
        moved = [[r + sign * eps * way if i == side else r for i, r in enumerate(current)] for sign in (1, -1)]
        slope = float((loss(moved[0]) - loss(moved[1])).detach()) / (2 * eps)
        assert float((grad * way).sum().detach()) == pytest.approx(slope, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("objective", [SafeClip, ShieldClip, SaferClip])
def test_rows_labeled_safe_stay_where_they_are(twelve, objective):
    """At the frozen model, a modality labeled safe has the least loss where it is: redirection has no pull on it."""
    _, frozen, bank = twelve
    current = QuadrupletEmbeddings(*(rows.clone().requires_grad_() for rows in frozen))
    f_t, f_v = LABELS["mixed"]
    # InfoNCE of two random rows pulls on pairs that are safe on both sides; the real CLIP's are aligned
    options = {ShieldClip: {"weights": {"safe": 0.0}}, SaferClip: {"k": 3}}
    module = attached(objective(**options.get(objective, {})), bank)
    loss = module(current, frozen, bank, None, f_t, f_v).loss
    text, image = torch.autograd.grad(loss, [current.unsafe_text, current.unsafe_image])
    for grad, labels in ((text, f_t), (image, f_v)):
        assert grad[labels == 0].abs().max() < 1e-9 < grad[labels == 1].abs().amax(1).min()


def test_bad_options():
    with pytest.raises(ValueError, match=r"unknown terms \['uni'\]"):
        SaferClip({"uni": 1.0})
    with pytest.raises(ValueError, match=r"unknown terms \['uni_text'\]; the terms are text_safe"):
        SafeClip({"uni_text": 1.0})
    with pytest.raises(ValueError, match=r"unknown terms \['uni_text'\]; the terms are real, safe"):
        ShieldClip({"uni_text": 1.0})
    with pytest.raises(ValueError, match="weights sum to 0"):
        SafeClip(dict.fromkeys(SAFECLIP_ORDER, 0.0))
    with pytest.raises(ValueError, match="targets='both'"):
        SafeClip(targets="both")
    with pytest.raises(ValueError, match="negative='both'"):
        SaferClip(negative="both")
    with pytest.raises(ValueError, match="k=0"):
        SaferClip(k=0)


@pytest.mark.parametrize("objective", [SafeClip, ShieldClip, SaferClip])
def test_labels_of_another_length_are_named(twelve, objective):
    with pytest.raises(ValueError, match=r"image\w* must have shape \[12\]"):
        objective()(*twelve, image_is_unsafe=torch.ones(3))
