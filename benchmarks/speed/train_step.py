"""Samples a second of one training step against the Safe-CLIP authors' step, and what each measure brings.

The authors' step, restated: transformers' CLIPModel with peft adapters (rank 16) on k_proj, v_proj, out_proj, fc1 and
fc2; captions padded to 77 tokens; in every step four forward passes with adapters and two without (safe text, safe
image), the eight terms of docs/method.md, backward, Adam. Each rung of the ladder adds one measure to the one
before. All rungs have the same weights, inputs and threads, and run in turns in one process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import Tensor

from benchmarks import harness
from saferclip_fast.bank import SafeBank
from saferclip_fast.data.captions import lengths, trim
from saferclip_fast.data.quadruplets import QuadrupletEmbeddings
from saferclip_fast.embeddings import embed_batch
from saferclip_fast.export.huggingface import to_hf
from saferclip_fast.models import ClipModel, load_clip
from saferclip_fast.models.lora import adapters_off
from saferclip_fast.objectives import SaferClip
from saferclip_fast.ops import nearest_safe
from saferclip_fast.train.step import forward_backward

SIDES = ("safe", "unsafe")
SAFE_CLIP_WEIGHTS = (0.1, 0.1, 0.1, 0.2, 0.25, 0.25, 0.25, 0.5)
RANK, START, END, WORDS = 16, 49406, 49407, 40000


def make_batch(size: int, image_size: int, shortest: int, longest: int) -> dict:
    """Random images and captions of evenly spread lengths, as data.Collate makes a batch, and padded to 77 tokens."""
    generator = torch.Generator().manual_seed(0)
    batch: dict = {"index": torch.arange(size)}
    for side in SIDES:
        batch[f"{side}_image"] = torch.randn(size, 3, image_size, image_size, generator=generator)
        tokens = torch.zeros(size, 77, dtype=torch.int64)
        for row in tokens:
            length = int(torch.randint(shortest, longest + 1, (), generator=generator))
            row[:length] = torch.randint(1, WORDS, (length,), generator=generator)
            row[0], row[length - 1] = START, END
        batch[f"{side}_padded"], batch[f"{side}_tokens"] = tokens, trim(tokens)
        batch[f"{side}_lengths"] = lengths(tokens)
    return batch


def make_clip(name: str, dropout: float, *without: str) -> ClipModel:
    """Our model with adapters; `without` names of measures to leave out."""
    measures = {
        "last block": ("saferclip_fast.models.blocks.LastBlock", lambda block: block),
        "activation": ("saferclip_fast.models.blocks.LeanQuickGELU", QuickGELU),
        "adapters": ("saferclip_fast.models.lora.AdaptedLinear", Linear),
    }
    torch.manual_seed(0)
    with warnings.catch_warnings(), ExitStack() as patches:
        warnings.simplefilter("ignore")
        for measure in measures.keys() & set(without):
            patches.enter_context(patch(*measures[measure]))
        clip = load_clip(name).add_lora(rank=RANK, dropout=dropout).train()
    if "packing" in without:
        clip.pack = lambda tokens, lengths: tokens  # type: ignore[method-assign]
    return clip


class Authors:
    """The authors' step; the flags take single measures."""

    def __init__(self, model, batch: dict, cached: bool = False, trimmed: bool = False, joint: bool = False) -> None:
        self.model, self.batch, self.cached, self.joint = model, batch, cached, joint
        self.tokens = "tokens" if trimmed else "padded"
        self.frozen: tuple[Tensor, Tensor] | None = None
        self.optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-4)

    def text(self, tokens: Tensor) -> Tensor:
        return self.model.get_text_features(input_ids=tokens).pooler_output

    def image(self, images: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=images).pooler_output

    @torch.no_grad()
    def reference(self) -> tuple[Tensor, Tensor]:
        """What the frozen model gives for the safe pair."""
        if self.frozen is None or not self.cached:
            with adapters_off(self.model):
                self.frozen = self.text(self.batch[f"safe_{self.tokens}"]), self.image(self.batch["safe_image"])
        return self.frozen

    def embed(self) -> QuadrupletEmbeddings:
        tokens = [self.batch[f"{side}_{self.tokens}"] for side in SIDES]
        images = [self.batch[f"{side}_image"] for side in SIDES]
        if self.joint:
            width = max(t.shape[1] for t in tokens)
            texts = self.text(torch.cat([F.pad(t, (0, width - t.shape[1])) for t in tokens])).chunk(2)
            pictures = self.image(torch.cat(images)).chunk(2)
        else:
            texts, pictures = tuple(map(self.text, tokens)), tuple(map(self.image, images))
        return QuadrupletEmbeddings(texts[0], pictures[0], texts[1], pictures[1])

    def __call__(self) -> None:
        safe_clip_loss(self.embed(), *self.reference()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def safe_clip_loss(current: QuadrupletEmbeddings, text: Tensor, image: Tensor) -> Tensor:
    text, image, *rows = (F.normalize(x, dim=-1) for x in (text, image, *current))
    safe_text, safe_image, unsafe_text, unsafe_image = rows

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return (1 - (x * y).sum(-1)).mean()

    def contrast(x: Tensor, y: Tensor) -> Tensor:
        logits, labels = 100 * x @ y.T, torch.arange(len(x))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    terms = (
        distance(safe_text, text),
        distance(unsafe_text, text),
        distance(safe_image, image),
        distance(unsafe_image, image),
        contrast(safe_text, image),
        contrast(unsafe_text, image),
        contrast(safe_image, text),
        contrast(unsafe_image, text),
    )
    return sum(w * term for w, term in zip(SAFE_CLIP_WEIGHTS, terms, strict=True)) / sum(SAFE_CLIP_WEIGHTS) / 8


class Ours:
    """This library's step with the default objective and gradient clipping, as train.py takes it."""

    def __init__(
        self, clip: ClipModel, batch: dict, frozen: QuadrupletEmbeddings, bank: SafeBank, micro_batch_size: int = 0
    ) -> None:
        self.clip, self.batch, self.frozen, self.bank, self.micro = clip, batch, frozen, bank, micro_batch_size
        self.objective = SaferClip()
        self.objective.attach(bank)
        self.neighbors = nearest_safe(frozen.unsafe_text, bank, min(self.objective.k, len(bank)))
        self.trainable = [p for p in clip.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.trainable, 1e-4, fused=True)

    def loss(self, current: QuadrupletEmbeddings):
        return self.objective(current, self.frozen, self.bank, self.neighbors)

    def __call__(self) -> None:
        forward_backward(self.clip, self.batch, self.loss, micro_batch_size=self.micro)
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def steps(name: str, batch: dict, dropout: float, ladder: bool) -> dict[str, Callable[[], None]]:
    """The step of each rung, from the authors' to ours; "eager" is theirs with what plain PyTorch can do about it."""
    clip = make_clip(name, dropout)
    theirs = to_hf(clip).requires_grad_(False)
    targets = ["k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    config = LoraConfig(r=RANK, lora_alpha=1, lora_dropout=dropout, target_modules=targets)
    theirs = inject_adapter_in_model(config, theirs).train()
    with torch.no_grad():
        frozen = QuadrupletEmbeddings(*Authors(theirs, batch).embed())
        check_same(frozen, embed_batch(clip, batch))
    bank = SafeBank(frozen.safe_text, frozen.safe_image)
    rungs: dict[str, Callable[[], None]] = {"authors": Authors(theirs, batch)}
    if ladder:
        rungs["+ frozen outputs cached"] = Authors(theirs, batch, cached=True)
        rungs["+ captions trimmed"] = Authors(theirs, batch, cached=True, trimmed=True)
    rungs["eager"] = Authors(theirs, batch, cached=True, trimmed=True, joint=True)  # + safe and unsafe in one pass
    if ladder:
        missing = ["adapters", "activation", "last block", "packing"]
        for label in (
            "+ open_clip, one query-key-value product",
            "+ adapters added in place",
            "+ leaner QuickGELU",
            "+ last block at one token",
        ):
            rungs[label] = Ours(make_clip(name, dropout, *missing), batch, frozen, bank)
            missing = missing[1:]
    rungs["ours"] = Ours(clip, batch, frozen, bank)  # + captions packed
    return rungs


def check_same(wanted: QuadrupletEmbeddings, found: QuadrupletEmbeddings) -> None:
    """Both models must give the same embeddings, or the comparison is of different things."""
    for theirs, ours in zip(wanted, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def main() -> None:
    parser = harness.parser(__doc__, rounds=7, budget_s=200)
    parser.add_argument("--model", default="ViT-B-32-quickgelu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs=2, default=(8, 25), metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters of both (the authors': 0.1)")
    parser.add_argument("--ladder", action="store_true", help="also every rung between the authors' step and ours")
    args = parser.parse_args()
    case = {"model": args.model, "B": args.batch, "tokens": list(args.tokens), "dropout": args.dropout}

    def paths(**_: object) -> dict[str, Callable[[], None]]:
        size = 224 if "ViT-B" in args.model else 32
        return steps(args.model, make_batch(args.batch, size, *args.tokens), args.dropout, args.ladder)

    harness.run("training step, fp32, LoRA 16", [{**case, "ladder": args.ladder}], paths, args)


if __name__ == "__main__":
    main()
