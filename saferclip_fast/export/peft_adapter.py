"""A run's LoRA adapters as peft reads them, on Hugging Face's CLIPModel.

in_proj's adapter B A with B [3d, r], A [r, d] is exactly three adapters: B's row blocks for q, k and v, each with A.
An adapter with a start of its own (lora.init=fisher) is one of twice the rank (models/lora.py, `factors`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from ..models import ClipModel
from ..models.huggingface import Unsupported, layer_names, quiet, to_hf
from ..models.lora import ADAPTER, factors, gain, lora_layers


def save_adapter(frozen: ClipModel, adapted: ClipModel, alpha: float, base: str | None, folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors.

    Args:
        frozen: the pre-trained model.
        adapted: the same one with trained adapters.
        alpha: the safety dial; multiplies the adapters' scale.
        base: what adapter_config.json names as the base model.
    """
    model = to_hf(frozen)
    layers = lora_layers(adapted.model)
    names = {name: layer_names(name) for name in layers}
    one = next(iter(layers.values()))
    rank, dora = len(factors(one)[0]), gain(one) is not None
    config = LoraConfig(
        r=rank,
        lora_alpha=one.scaling[ADAPTER] * rank * (1 if dora else alpha),
        target_modules=_targets(model, [hf for group in names.values() for hf in group]),
        base_model_name_or_path=base,
        use_dora=dora,
    )
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for name, layer in layers.items():
            a, b, lengths = _dialed(layer, alpha) if dora else (*factors(layer), None)
            parts = len(names[name])
            for number, hf_name in enumerate(names[name]):
                target: Any = model.get_submodule(hf_name)
                target.lora_A[ADAPTER].weight.copy_(a)
                target.lora_B[ADAPTER].weight.copy_(b.chunk(parts)[number])
                if lengths is not None:
                    target.lora_magnitude_vector[ADAPTER].weight.copy_(lengths.chunk(parts)[number])
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)


def load_adapter(frozen: ClipModel, folder: Path) -> nn.Module:
    """The adapter in `folder` on the frozen model, by peft; has CLIPModel's methods."""
    with quiet():
        return PeftModel.from_pretrained(to_hf(frozen), str(folder)).eval()


def _dialed(layer: Any, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """A [R, in], B [out, R] and row lengths m [out] of a DoRA adapter at the dial `alpha`, exactly a DoRA adapter too.

    With g = m / |W + s B A| by row, W + alpha (g (W + s B A) - W) = c (W + (alpha g / c) s B A), c = 1 + alpha (g - 1).

    Raises Unsupported where a row has c = 0, as far beyond 1 only a row that training shortened can have.
    """
    a, b = factors(layer)
    more = gain(layer)
    assert more is not None
    kept = 1 + alpha * more
    if not kept.all():
        raise Unsupported(
            f"a DoRA adapter has no dial of {alpha:g}: export with --format huggingface, or a lower --alpha"
        )
    b = b * (alpha * (1 + more) / kept)[:, None]
    weight = layer.get_base_layer().weight + layer.scaling[ADAPTER] * b @ a
    return a, b, kept * weight.norm(dim=1)


def _targets(model: nn.Module, names: list[str]) -> list[str]:
    """The layers' last names where these say the same as the full ones."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    meant = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in endings}
    return endings if meant == set(names) else names
