"""What training costs by formula: the capacity table of docs/scale.md. Nothing here is measured.

python -m benchmarks.memory.capacity        # prints the table; tests compare it with the page
"""

from __future__ import annotations

from dataclasses import dataclass

import open_clip

MODELS = ("ViT-B-32", "ViT-L-14", "ViT-H-14")
GPUS = (1, 2, 4, 8, 16, 32, 64)
SAMPLES = 165_000  # ViSU's training quadruplets
MICRO_BATCH = 16  # quadruplets on a GPU at a time
CAPTION = 40  # tokens of the longest caption of a batch
RANK = 16  # of the LoRA adapters
PEAK = 312e12  # bf16 multiply-adds times 2 a second, A100 (its data sheet)
UTILIZATION = 0.35  # assumed: the share of the peak that transformers of this size reach
BANDWIDTH = 25e9  # bytes a second between machines, each way: 200 Gbit/s
ACTIVATION_BYTES = 34  # a token, a layer and a unit of width, bf16, attention not stored (arXiv 2205.05198, section 4)


@dataclass(frozen=True)
class Tower:
    """A transformer: `tokens` of `width`, `layers` layers, and what embeds its input."""

    width: int
    layers: int
    tokens: int
    input_weights: int  # parameters that turn pixels or words into tokens, positions included
    input_flops: int
    embedding: int

    @property
    def weights(self) -> int:
        return self.layers * 12 * self.width**2 + self.input_weights + self.width * self.embedding

    @property
    def flops(self) -> float:
        """Of one input's forward pass: 12 w^2 + 2 T w multiply-adds a token and layer, 2 operations each."""
        layer = 12 * self.width**2 + 2 * self.tokens * self.width
        return 2 * self.layers * layer * self.tokens + self.input_flops

    @property
    def adapters(self) -> int:
        """LoRA weights: rank x (in + out) of in_proj (1+3), out_proj (1+1), c_fc (1+4), c_proj (4+1)."""
        return self.layers * RANK * 16 * self.width

    @property
    def activations(self) -> float:
        """Bytes that one input keeps for the backward pass."""
        return self.layers * self.tokens * self.width * ACTIVATION_BYTES


def towers(name: str) -> tuple[Tower, Tower]:
    """The image and the text encoder of an open_clip ViT."""
    config = open_clip.get_model_config(name)
    vision, text, embedding = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    patch, width = vision["patch_size"], vision["width"]
    grid = (vision["image_size"] // patch) ** 2
    pixels = 3 * patch**2 * width
    image = Tower(width, vision["layers"], grid + 1, pixels + (grid + 1) * width, 2 * pixels * grid, embedding)
    words = (text["vocab_size"] + text["context_length"]) * text["width"]
    return image, Tower(text["width"], text["layers"], CAPTION, words, 0, embedding)


def predict(name: str, gpus: int, tuning: str = "lora") -> dict[str, float]:
    """Memory of one GPU in GB and minutes of an epoch over ViSU.

    memory  = 4 P + 12 P_trained + 2 MICRO_BATCH (A_image + A_text) + 30 N d
    step    = MICRO_BATCH (2 F_image + 2 F_text) passes / (PEAK UTILIZATION) + 2 (n-1)/n 4 P_trained / BANDWIDTH
    epoch   = SAMPLES / (n MICRO_BATCH) step

    P weights in float32; gradient and Adam's two moments of what is trained; A activations of one input; N d rows of
    the bank and of the rank guard's two lists of queries, each in float32 twice and in fp16 once. F forward operations
    of one input; passes = 2 for LoRA (forward, and backward to the inputs), 3 for full tuning (and to the weights).
    Nothing overlaps; the loader keeps up.
    """
    image, text = towers(name)
    weights = image.weights + text.weights
    trained = weights if tuning == "full" else image.adapters + text.adapters
    passes = 3 if tuning == "full" else 2
    memory = 4 * weights + 12 * trained + 2 * MICRO_BATCH * (image.activations + text.activations)
    memory += 30 * SAMPLES * image.embedding
    work = MICRO_BATCH * 2 * (image.flops + text.flops) * passes / (PEAK * UTILIZATION)
    exchange = 2 * (gpus - 1) / gpus * 4 * trained / BANDWIDTH
    steps = SAMPLES / (gpus * MICRO_BATCH)
    return {"memory_gb": memory / 1e9, "epoch_minutes": steps * (work + exchange) / 60}


def table() -> str:
    """The table as Markdown."""
    lines = [
        "| model, tuning | memory of a GPU, GB | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in GPUS) + " |",
        "|---" * (len(GPUS) + 2) + "|",
    ]
    for name in MODELS:
        for tuning in ("lora", "full"):
            cells = [predict(name, gpus, tuning) for gpus in GPUS]
            times = " | ".join(f"{cell['epoch_minutes']:.3g}" for cell in cells)
            lines.append(f"| {name}, {tuning} | {cells[0]['memory_gb']:.3g} | {times} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
