"""How many bank rows survive the screen of nearest_safe: python -m benchmarks.speed.screen_survivors

The bounds of csrc/kernels/cuda/screen.cuh in plain PyTorch, for int8 and 16-bit copies, on rows in all directions, in a
cone (as CLIP embeddings are) and in a cone with three outlier dimensions. It is why the CUDA screen is fp16. A second
table: how many rows Triton's screen of groups scores (saferclip_fast/ops/triton/grouped_screen.py). With `--weights`, a
third one: what int8 leaves of the image embeddings of the demo's model (.cache/saferclip/RN-small-32-*.safetensors),
centered on their mean.
"""

import argparse

import torch
import torch.nn.functional as F

from saferclip_fast.data.synthetic import scenes
from saferclip_fast.demo.pretrain import preprocess
from saferclip_fast.models import load_clip

ROWS, QUERIES, DIM, KS = 100_000, 64, 768, (1, 8, 32)
GROUP_KS = (1, 8, 16, 32)


def quantized(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "int8":
        scale = x.abs().amax(1, keepdim=True) / 127
        return (x / scale).round() * scale
    scale = x.abs().amax(1, keepdim=True)
    return (x / scale).to(getattr(torch, kind)).float() * scale


def survivors(query: torch.Tensor, bank: torch.Tensor, kind: str, k: int) -> float:
    """Mean number of rows whose upper bound reaches the k-th largest lower bound."""
    q, s = quantized(query, kind), quantized(bank, kind)
    rounding = 2**-20 + (0 if kind == "int8" else 1.25 * 2**-23 * (query.shape[1] + 16))
    margin = ((query - q).norm(dim=1) + rounding)[:, None] + q.norm(dim=1)[:, None] * (bank - s).norm(dim=1)
    value = q @ s.T
    threshold = (value - margin).topk(k).values[:, -1:]
    return (value + margin >= threshold).sum(1).float().mean().item()


def scored_by_groups(query: torch.Tensor, bank: torch.Tensor, k: int) -> float:
    """Mean number of rows that the screen of groups scores: the best of a group over the line, or all 32."""
    q, s = query.to(torch.float16).float(), quantized(bank, "float16")
    lost, error = (query - q).norm(dim=1), (bank - s).norm(dim=1).max()
    of_query = lost + query.norm(dim=1) * (DIM + 32) * 2**-22
    c = 1.001 * (of_query * bank.norm(dim=1).max() + error * (query.norm(dim=1) + of_query))
    whole = len(bank) // 256 * 256
    x = F.pad(q @ s.T, (0, -len(bank) % 256)).view(len(query), -1, 32, 8)
    best, second = x.topk(2, dim=2).values.movedim(2, 0).flatten(2)
    merged = F.pad(best[:, : whole // 32], (0, -(whole // 32) % 1024), value=-torch.inf)
    line = merged.view(len(query), -1, 1024).amax(1).topk(k).values[:, -1] - 2.001 * c
    several = (second >= line[:, None]).sum(1)
    return ((best >= line[:, None]).sum(1) + 31 * several).float().mean().item()


def heading(title: str, ks: tuple[int, ...]) -> str:
    return f"| {title} | " + " | ".join(f"k = {k}" for k in ks) + " |\n|---|" + "---|" * (title.count("|") + len(ks))


def of_the_demo(weights: str, rows: int = 30_000) -> str:
    """Survivors of the demo's scenes: QUERIES images and their texts, among `rows` other images."""
    clip = load_clip("RN-small-32", weights)
    images, captions = scenes.pretrain_pairs(rows + QUERIES, seed=77)
    pixels = preprocess(clip, images)
    with torch.no_grad():
        image = F.normalize(torch.cat([clip.encode_image(part).float() for part in pixels.split(512)]), dim=1)
        text = F.normalize(clip.encode_text(clip.tokenizer(captions[rows:])).float(), dim=1)
    bank = image[:rows]
    lines = [heading("query of the demo's model | copy", KS)]
    for name, query in (("image", image[rows:]), ("text", text)):
        for kind, searched in (("int8", bank - bank.mean(0)), ("float16", bank)):
            counts = " | ".join(f"{survivors(query, searched, kind, k):,.1f}" for k in KS)
            lines.append(f"| {name} | {kind} | {counts} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="a weights file of the demo's model")
    given = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    print(heading("rows | copy", KS))
    grouped = [heading("rows, screened in groups", GROUP_KS)]
    for name, center, outlier in (("all directions", 0.0, 0.0), ("cone", 2.0, 0.0), ("cone, 3 outliers", 2.0, 24.0)):
        common = center * torch.randn(1, DIM, generator=generator)
        common[0, :3] += outlier
        query, bank = (F.normalize(torch.randn(n, DIM, generator=generator) + common, dim=1) for n in (QUERIES, ROWS))
        for kind in ("int8", "bfloat16", "float16"):
            counts = " | ".join(f"{survivors(query, bank, kind, k):,.1f}" for k in KS)
            print(f"| {name} | {kind} | {counts} |")
        counts = " | ".join(f"{scored_by_groups(query, bank, k):,.1f}" for k in GROUP_KS)
        grouped.append(f"| {name} | {counts} |")
    print("", *grouped, sep="\n")
    if given.weights:
        print("", of_the_demo(given.weights), sep="\n")
