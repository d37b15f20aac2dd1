"""A run's LoRA adapters as peft reads them, on Hugging Face's CLIPModel.

in_proj's adapter B A with B [3d, r], A [r, d] is exactly three adapters: B's row blocks for q, k and v, each with A.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ..models import ClipModel
from ..models.huggingface import layer_names, quiet, to_hf
from ..models.lora import ADAPTER, lora_layers


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
    config = LoraConfig(
        r=one.r[ADAPTER],
        lora_alpha=one.lora_alpha[ADAPTER] * alpha,
        target_modules=_targets(model, [hf for group in names.values() for hf in group]),
        base_model_name_or_path=base,
    )
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for name, layer in layers.items():
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            for hf_name, rows in zip(names[name], b.chunk(len(names[name])), strict=True):
                target: Any = model.get_submodule(hf_name)
                target.lora_A[ADAPTER].weight.copy_(a)
                target.lora_B[ADAPTER].weight.copy_(rows)
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)


def load_adapter(frozen: ClipModel, folder: Path) -> nn.Module:
    """The adapter in `folder` on the frozen model, by peft; has CLIPModel's methods."""
    with quiet():
        return PeftModel.from_pretrained(to_hf(frozen), str(folder)).eval()


def _targets(model: nn.Module, names: list[str]) -> list[str]:
    """The layers' last names where these say the same as the full ones."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    meant = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in endings}
    return endings if meant == set(names) else names
