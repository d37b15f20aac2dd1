"""Messages of the ops on inputs that do not fit: the argument, the row, the remedy."""

import pytest
import torch

import saferclip_fast as sf
from saferclip_fast.ops import neighbor_hinge

Q = torch.randn(4, 8)
BANK = sf.SafeBank(torch.randn(10, 8), torch.randn(10, 8))


def bad(rows=4, row=2, value=float("nan")):
    x = torch.randn(rows, 8)
    x[row, 3] = value
    return x


def on_meta(neighbors):
    return sf.Neighbors(*(part.to("meta") for part in neighbors))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sf.nearest_safe(Q[None], BANK), r"query must have shape \[rows, d\], got \(1, \d+, 8\)"),
        (lambda: sf.nearest_safe(Q.long(), BANK), r"query must be float64, float32, .* got torch.int64; use \.float"),
        (lambda: sf.nearest_safe(Q[:, :5], BANK), r"bank has d=8 but query has d=5"),
        (lambda: sf.nearest_safe(Q, BANK, k=11), r"k=11 must lie between 1 and the bank's 10 rows"),
        (lambda: sf.nearest_safe(Q, BANK, k=0), r"k=0 must lie between 1"),
        (lambda: sf.nearest_safe(Q, torch.zeros(0, 8)), r"bank is empty"),
        (lambda: sf.nearest_safe(bad(), BANK), r"query holds NaN or Inf, first in row 2 \(1 of 4 rows\)"),
        (lambda: sf.nearest_safe(Q, bad(10, 7, float("inf"))), r"bank holds NaN or Inf, first in row 7"),
        (lambda: sf.nearest_safe(Q, 3 * BANK.text), r"bank row 0 has length 3, not 1, .* SafeBank\(text, image\)"),
        (lambda: sf.nearest_safe(Q, BANK, backend="fpga"), r"backend='fpga' is unknown; use 'auto' or one of"),
        (lambda: sf.nearest_safe(Q.to("meta"), BANK), r"bank is on cpu but query is on meta"),
        (lambda: sf.nearest_safe(Q.double(), BANK, backend="cpu"), r"backend='cpu' takes float32.* got torch.float64"),
        (lambda: sf.retarget_loss(Q, Q[:3], Q, Q, BANK), r"image has 3 rows but text has 4"),
        (lambda: sf.retarget_loss(Q, Q, Q, bad(), BANK), r"frozen_image holds NaN or Inf, first in row 2"),
        (lambda: sf.retarget_loss(Q, Q.half(), Q, Q, BANK), r"image is torch.float16 but text is torch.float32"),
        (lambda: sf.retarget_loss(Q, Q, Q, Q, BANK, negative="mine"), r"negative='mine' must be 'frozen' or"),
        (
            lambda: sf.retarget_loss(Q, Q, Q, Q, BANK, weights={"uni": 1}),
            r"unknown terms \['uni'\]; the terms are",
        ),
        (lambda: sf.retarget_loss(Q, Q, Q, Q, BANK, beta=0), r"beta=0 and tau=0.05 must be positive"),
        (
            lambda: sf.retarget_loss(Q, Q, Q, Q, BANK, text_is_unsafe=torch.ones(3)),
            r"text_is_unsafe must have shape \[4\]",
        ),
        (
            lambda: sf.retarget_loss(Q, Q, Q, Q, BANK, neighbors=sf.nearest_safe(Q[:3], BANK)),
            r"neighbors must hold scores and indices of shape \[4, k\]",
        ),
        (
            lambda: sf.retarget_loss(
                Q, Q, Q, Q, BANK, neighbors=sf.Neighbors(torch.ones(4, 1), torch.full((4, 1), 10))
            ),
            r"spans 10\.\.10 but the bank has 10 rows",
        ),
        (
            lambda: sf.retarget_loss(Q, Q, Q, Q, BANK, neighbors=on_meta(sf.nearest_safe(Q, BANK))),
            r"neighbors.scores is on meta but text is on cpu; move one with \.to\(\)",
        ),
        (
            lambda: neighbor_hinge(Q[:, :6], BANK.text, on_meta(sf.nearest_safe(Q, BANK)), torch.ones(4)),
            r"neighbor_hinge: indices is on meta, the rows on cpu; move one with \.to\(\)",
        ),
        (
            lambda: sf.info_nce(Q, Q, mask=torch.ones(4, device="meta"), check=False),
            r"info_nce_sums: mask is on meta, the rows on cpu",
        ),
        (lambda: sf.preservation_loss(Q, Q, bad(), Q), r"frozen_text holds NaN or Inf, first in row 2"),
        (lambda: sf.preservation_loss(Q[:0], Q[:0], Q[:0], Q[:0]), r"text has no rows"),
    ],
)
def test_message(call, message):
    with pytest.raises(ValueError, match=message):
        call()


NAN, INF = float("nan"), float("inf")
LABELS = torch.tensor([0.0, 1.0, 1.5, 1.0])


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: sf.retarget_loss(Q, Q, Q, Q, BANK, text_is_unsafe=LABELS), ValueError, "row 2 has 1.5"),
        (lambda: sf.retarget_loss(Q, Q, Q, Q, BANK, text_is_unsafe=2 * LABELS), ValueError, "row 1 has 2"),
        (
            lambda: sf.retarget_loss(Q, Q, Q, Q, BANK, image_is_unsafe=-LABELS),
            ValueError,
            "image_is_unsafe .*row 1 has -1",
        ),
        (lambda: sf.retarget_loss(Q, Q, Q, Q, BANK, image_is_unsafe=NAN * LABELS), ValueError, "row 0 has nan"),
        (
            lambda: sf.retarget_loss(Q, Q, Q, Q, BANK, text_is_unsafe=[1] * 4),
            TypeError,
            "must be a torch.Tensor, got list",
        ),
        *(
            (
                lambda name=name, value=value: sf.retarget_loss(Q, Q, Q, Q, BANK, **{name: value}),
                ValueError,
                f"{name}={value}",
            )
            for name in ("tau", "beta", "margin")
            for value in (NAN, INF)
        ),
        (lambda: sf.retarget_loss(Q, Q, Q, Q, BANK, weights={"uni_text": NAN}), ValueError, "'uni_text'.=nan must be"),
        (lambda: sf.preservation_loss(Q, Q, Q, Q, weights={"cos_text": INF}), ValueError, "'cos_text'.=inf must be"),
        (
            lambda: sf.preservation_loss(Q, Q, Q, Q, logit_scale=NAN),
            ValueError,
            "logit_scale=nan must be a finite number",
        ),
        (
            lambda: sf.preservation_loss(Q, Q, Q, Q, logit_scale=torch.tensor(100.0, requires_grad=True)),
            TypeError,
            "logit_scale must be a number and gets no gradient",
        ),
        (lambda: sf.preservation_loss(Q, Q, Q, Q, logit_scale="100"), TypeError, "logit_scale must be a number"),
        (lambda: sf.preservation_loss(Q, Q, Q, Q, weights=[1, 1]), TypeError, "weights must map terms to numbers"),
        (
            lambda: sf.retarget_loss(Q, Q, Q, Q, BANK, counts=torch.full((4,), NAN)),
            ValueError,
            "counts must be numbers of",
        ),
        (lambda: sf.retarget_loss(Q, Q, Q, Q, BANK, counts=torch.ones(3)), ValueError, r"counts must have shape \[4\]"),
        (
            lambda: sf.retarget_loss(Q, Q, Q, Q, BANK, neighbors=(Q, Q)),
            TypeError,
            "neighbors must be what nearest_safe",
        ),
        (lambda: sf.retarget_loss(Q, Q, Q, Q, BANK.text), TypeError, "bank must be a SafeBank, got Tensor"),
        (lambda: sf.nearest_safe(Q, [1, 2]), TypeError, "bank must be a SafeBank, got list"),
        (lambda: sf.nearest_safe(Q, BANK, 2.0), TypeError, "k must be a whole number, got float 2.0"),
        (lambda: sf.retarget_loss(Q, Q, Q, Q, BANK, 2.0), TypeError, "k must be a whole number, got float 2.0"),
    ],
)
def test_labels_and_options_without_meaning_are_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_bank_that_was_written_to_after_it_was_packed_is_refused():
    bank = sf.SafeBank(torch.randn(10, 8), torch.randn(10, 8)).pack()
    if bank.packed is None:
        pytest.skip("the native module is not built")
    sf.nearest_safe(Q, bank)
    bank.text.copy_(bank.text.flip(0))
    with pytest.raises(ValueError, match=r"bank.text was changed after pack"):
        sf.nearest_safe(Q, bank)


def test_a_backend_that_is_not_there_says_why():
    unusable = [name for name, row in sf.backends().items() if not row.usable]
    for name in unusable:
        with pytest.raises(RuntimeError, match=f"backend='{name}' cannot run nearest_safe here: "):
            sf.nearest_safe(Q, BANK, backend=name)


def test_large_finite_values_are_not_taken_for_infinity():
    sf.nearest_safe(torch.full((2, 8), 3e38), BANK)


def test_check_false_skips_the_value_checks():
    assert sf.nearest_safe(Q, 3 * BANK.text, check=False).scores.max() > 1
