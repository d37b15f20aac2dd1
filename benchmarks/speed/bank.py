"""Building a bank: embedding its pairs, and packing their rows for the search.

`pack`: pack_bank against int8 quantization by row in PyTorch, which does less (no error bounds, no layout for the
kernels), and a copy of the rows. `embed`: quadruplets through the frozen encoders, against transformers' CLIPModel of
the same weights; `authors`: four passes, captions padded to 77 tokens; `eager`: two passes, captions trimmed.
"""

from __future__ import annotations

import warnings

import torch

from benchmarks import harness
from benchmarks.speed.train_step import Authors, check_same, make_batch
from saferclip_fast.embeddings import embed_batch
from saferclip_fast.export.huggingface import to_hf
from saferclip_fast.models import load_clip

PACK = {"part": "pack", "N": 100_000, "d": 768}
EMBED = {"part": "embed", "model": "ViT-B-32-quickgelu", "B": 16}


def quantized(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = rows.abs().amax(1, keepdim=True) / 127
    return (rows / scale).round().to(torch.int8), scale


def pack(N: int, d: int) -> harness.Paths:
    rows = torch.nn.functional.normalize(torch.randn(N, d), dim=1)
    copy, compiled = torch.empty_like(rows), torch.compile(quantized, dynamic=False)
    return {
        "ours": lambda: torch.ops.saferclip_fast.pack_bank(rows),
        "eager": lambda: quantized(rows),
        "compiled": lambda: compiled(rows),
        "copy": lambda: copy.copy_(rows),
    }


def embed(model: str, B: int) -> harness.Paths:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights
        clip = load_clip(model).eval()
    size = clip.preprocessing["size"]
    batch = make_batch(B, size if isinstance(size, int) else size[0], 8, 25)
    theirs = to_hf(clip).eval()
    found = {
        "ours": lambda: embed_batch(clip, batch),
        "authors": Authors(theirs, batch).embed,
        "eager": Authors(theirs, batch, trimmed=True, joint=True).embed,
    }
    frozen = {name: torch.no_grad()(path) for name, path in found.items()}
    check_same(frozen["authors"](), frozen["ours"]())
    return frozen


def paths(part: str, **sizes) -> harness.Paths:
    return {"pack": pack, "embed": embed}[part](**sizes)


if __name__ == "__main__":
    harness.run("building a bank", [PACK, EMBED], paths, harness.parser(__doc__, 5, 20).parse_args())
