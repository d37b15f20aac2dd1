"""Low-rank adapters (peft) inside an open_clip model: added in place, switched off, merged on export."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

ADAPTER = "default"
CAPTIONING = "text_decoder."  # CoCa's caption decoder takes no part in an embedding
FIRST_LAYER = "visual.conv1"  # pixels to channels: adapted only where it is asked for by name


def adaptable_layers(model: nn.Module) -> list[str]:
    """Names of the encoders' linear layers and dense convolutions whose forward is called, so that an adapter acts."""
    unfit: set[Any] = set()  # an adapter around them would not act, or stop the model
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention | AttentionPool2d):  # they read their layers' weights, uncalled
            unfit.update(module.modules())
        if getattr(module, "q_bias", None) is not None:  # so does timm's attention with separate biases (EVA, BEiT)
            unfit.add(getattr(module, "qkv", None))
        unfit.add(getattr(module, "text_projection", None))  # open_clip calls it only if it is an nn.Linear itself
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
        and module not in unfit
        and not name.startswith(CAPTIONING)
    ]


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float, targets: Sequence[str]) -> None:
    """Freeze `model` and add adapters W + (alpha / rank) B A, in place; B starts at zero.

    Args:
        model: an open_clip model whose attention was unpacked (attention.unpack_attention).
        rank: inner width r of A [r, in] and B [out, r].
        alpha: scale numerator.
        dropout: applied to the adapters' input, in training only.
        targets: endings of layer names ("in_proj", "c_fc", ...), or ["all"] for every linear layer
            and dense convolution but the first.

    Raises:
        ValueError: a target that names no such layer, or an encoder left without an adapter.
    """
    layers = adaptable_layers(model)
    if list(targets) == ["all"]:
        chosen = [name for name in layers if name != FIRST_LAYER]
    else:
        chosen = _select(layers, targets)
    for encoder, present in (
        ("image", any(name.startswith("visual.") for name in chosen)),
        ("text", any(not name.startswith("visual.") for name in chosen)),
    ):
        if not present:
            raise ValueError(
                f"lora.targets={list(targets)} adds no adapter to the {encoder} encoder; "
                f"this model's layers end in: {', '.join(_endings(layers))}"
            )
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen)  # type: ignore[arg-type]
    config._register_custom_module({nn.Linear: AdaptedLinear})
    inject_adapter_in_model(config, model, ADAPTER)


class AdaptedLinear(Linear):
    """peft's LoRA layer with the adapter's part added to the output in place: x W^T + b, then += s (x A^T) B^T.

    peft makes three more tensors of the output's size: B's product, its scaled copy, and the sum.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        a, b = (getattr(self, name)[ADAPTER].weight for name in ("lora_A", "lora_B"))
        rows = x.flatten(0, -2)  # matrices: an update in place of a view would be copied in the backward pass
        inner = F.linear(self.lora_dropout[ADAPTER](rows), a)
        out = F.linear(rows, base.weight, base.bias)
        out = out.addmm_(inner.to(out.dtype), b.t().to(out.dtype), alpha=self.scaling[ADAPTER])
        return out.unflatten(0, x.shape[:-1])


def _select(layers: Sequence[str], targets: Sequence[str]) -> list[str]:
    for target in targets:
        if not any(_matches(name, target) for name in layers):
            near = difflib.get_close_matches(target, _endings(layers), 1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"lora.targets: no layer ends in {target!r}{hint} Choose from: {', '.join(_endings(layers))}"
            )
    return [name for name in layers if any(_matches(name, target) for target in targets)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _endings(layers: Sequence[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in layers})


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that carry an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def remove_lora(model: nn.Module) -> None:
    """Inverse of add_lora but for what is frozen: `model` computes with the very same weights, without adapters."""
    for name, layer in lora_layers(model).items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())
    if hasattr(model, "peft_config"):  # peft's note, which it would warn of the next time
        del model.peft_config


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes what it computed before add_lora, from the very same weights."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights with the adapters folded in, W + (alpha / rank) B A, under the names used before add_lora.

    The model itself is not touched. Tensors without an adapter are shared with it, not copied.
    """
    state = {
        name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name
    }
    for name, layer in lora_layers(model).items():
        weight = layer.get_base_layer().weight.detach()
        state[f"{name}.weight"] = weight + layer.get_delta_weight(ADAPTER).detach().to(weight.dtype)
    return state
