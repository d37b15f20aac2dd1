"""Low-rank adapters (peft) inside an open_clip model: added in place, switched off, merged on export.

The base layers hold the frozen weights, bit for bit, whatever the adapters are and wherever they start.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Conv2d, Linear, LoraLayer
from torch import Tensor, nn
from torch.func import functional_call

ADAPTER = "default"
CAPTIONING = "text_decoder."  # CoCa's caption decoder takes no part in an embedding
START_A, START_B = "lora_start_A", "lora_start_B"  # buffers of a layer whose adapter has a start of its own
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


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    dora: bool = False,
    start: bool = False,
) -> None:
    """Freeze `model` and add adapters, in place, which change nothing before they are trained.

        W' = W + s B A                               s = alpha / rank; B starts at zero
        W' = W + s ((B0 + B) (A0 + A) - B0 A0)       with `start`; A and B start at zero (ours, after PiSSA)
        W'' = m W' / |W'|                            with `dora`: rows of length m, which starts as |W|

    Until set_start sets them, B0 is zero and A0 drawn as LoRA's A is: then the second line is the first one. DoRA
    (arXiv 2402.09353) takes |W'| as a constant in the backward pass. Its rows are those that make one output each, as
    peft's are; a row of zeros is left as it is.

    Args:
        model: an open_clip model whose attention was unpacked (attention.unpack_attention).
        rank: inner width r of A [r, in] and B [out, r].
        alpha: scale numerator.
        dropout: applied to the adapters' input, in training only.
        targets: endings of layer names ("in_proj", "c_fc", ...), or ["all"] for every linear layer
            and dense convolution but the first.
        dora: train the rows' lengths m apart from their directions.
        start: give every layer the constants A0 [r, in] and B0 [out, r], in a model's state and in checkpoints.

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
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules="|".join(map(re.escape, chosen)),  # a list would be of endings
        use_dora=dora,
    )
    config._register_custom_module({nn.Linear: AdaptedLinear, nn.Conv2d: AdaptedConv2d})
    inject_adapter_in_model(config, model, ADAPTER)
    for layer in lora_layers(model).values():
        if dora:  # a vector for convolutions too, which weight decay leaves alone
            layer.lora_magnitude_vector[ADAPTER].weight = nn.Parameter(_row_lengths(layer.get_base_layer().weight))
        if start:
            a, b = _trained(layer)
            layer.register_buffer(START_A, a.detach().clone())
            layer.register_buffer(START_B, torch.zeros_like(b))
            nn.init.zeros_(a)


class AdaptedLinear(Linear):
    """peft's LoRA layer with the adapter's part added to the output in place: x W^T + b, then += s (x A^T) B^T.

    peft makes three more tensors of the output's size: B's product, its scaled copy, and the sum. With DoRA, dropout
    acts on the adapter's input alone, as without (peft's also drops what goes through the frozen weight).
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        a, b = factors(self)
        rows = x.flatten(0, -2)  # matrices: an update in place of a view would be copied in the backward pass
        inner = F.linear(self.lora_dropout[ADAPTER](rows), a)
        out = F.linear(rows, base.weight, base.bias)
        out = out.addmm_(inner.to(out.dtype), b.t().to(out.dtype), alpha=self.scaling[ADAPTER])
        return _with_lengths(self, out, base.bias, out.shape[-1:]).unflatten(0, x.shape[:-1])


class AdaptedConv2d(Conv2d):
    """peft's LoRA layer of a convolution, also with a start of its own, and with DoRA as AdaptedLinear has it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        a, b = factors(self)
        # the module's own forward, since timm has convolutions that pad in a way of their own
        inner = functional_call(self.lora_A[ADAPTER], {"weight": a}, (self.lora_dropout[ADAPTER](x),))
        out = base(x).add_(F.conv2d(inner, b * self.scaling[ADAPTER]))  # scaling b saves two passes over the output
        return _with_lengths(self, out, base.bias, (-1, 1, 1))


def factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A [R, in, ...] and B [out, R, ...] of an adapted layer: its weight is W + s B A before DoRA.

    R is the rank r, and 2 r from a start: (B0 + b) (A0 + a) - B0 A0 = b (A0 + a) + B0 a, which is 0 at a = b = 0, not
    the difference of two roundings.
    """
    a, b = _trained(layer)
    if not hasattr(layer, START_A):
        return a, b
    return torch.cat([a + getattr(layer, START_A), a]), torch.cat([b, getattr(layer, START_B)], dim=1)


def change(layer: Any) -> Tensor:
    """s B A as the weight's shape, before DoRA."""
    a, b = factors(layer)
    product = b.flatten(1) @ a.flatten(1) * layer.scaling[ADAPTER]
    return product.view_as(layer.get_base_layer().weight)


def gain(layer: Any) -> Tensor | None:
    """m / |W'| - 1 [out] of a layer with DoRA, a gradient for m alone; None without. 0 where W' is a row of zeros."""
    if ADAPTER not in layer.lora_magnitude_vector:
        return None
    magnitude = layer.lora_magnitude_vector[ADAPTER].weight
    with torch.no_grad(), torch.autocast(magnitude.device.type, enabled=False):
        lengths = _row_lengths(layer.get_base_layer().weight + change(layer))
    there = lengths > 0
    return torch.where(there, magnitude / torch.where(there, lengths, 1.0), 1.0) - 1


@torch.no_grad()
def set_start(layer: Any, wanted: Tensor) -> None:
    """Let s B0 A0 be the best approximation of `wanted` [out, ...], of the weight's shape, by rank r.

    Both factors have the roots of its singular values. Where the rank is more than the matrix has, what is left over of
    A0 stays as it was drawn.
    """
    u, values, v = torch.linalg.svd(wanted.flatten(1).float(), full_matrices=False)
    a, b = getattr(layer, START_A), getattr(layer, START_B)
    count = min(len(a), len(values))
    roots = (values[:count] / layer.scaling[ADAPTER]).sqrt()
    a[:count] = (roots[:, None] * v[:count]).view_as(a[:count])
    b.zero_()
    b[:, :count] = (u[:, :count] * roots).view_as(b[:, :count])


def start_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A0 and B0 of every layer that is trained and has them, by the names that the model's state has."""
    return {
        f"{name}.{own}": getattr(layer, own)
        for name, layer in lora_layers(model).items()
        if hasattr(layer, START_A) and layer.lora_A[ADAPTER].weight.requires_grad
        for own in (START_A, START_B)
    }


def _trained(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def _row_lengths(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.detach().flatten(1), dim=1)


def _with_lengths(layer: Any, out: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    """DoRA's outputs from those of W': out + gain (out - bias), the gain along the dimension that `shape` spreads."""
    more = gain(layer)
    if more is None:
        return out
    more = more.view(*shape)
    scaled = torch.addcmul(out, out, more.to(out.dtype))  # adds the gain's part, which rounds less than a factor near 1
    return scaled if bias is None else scaled - (more * bias.view(*shape)).to(out.dtype)


def _select(layers: Sequence[str], targets: Sequence[str]) -> list[str]:
    for target in targets:
        if not any(_matches(name, target) for name in layers):
            near = difflib.get_close_matches(target, _endings(layers), 1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"lora.targets: no layer ends in {target!r}{hint} Choose from: {', '.join(_endings(layers))}"
            )
    # a whole name is that layer alone: "transformer.resblocks.0.mlp.c_fc" is also an ending of the image encoder's
    whole, endings = set(layers) & set(targets), set(targets) - set(layers)
    return [name for name in layers if name in whole or any(_matches(name, ending) for ending in endings)]


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
    """Weights with the adapters folded in, W' or W'' of add_lora, under the names used before it.

    The model itself is not touched. Tensors without an adapter are shared with it, not copied.
    """
    state = {
        name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name
    }
    for name, layer in lora_layers(model).items():
        weight = layer.get_base_layer().weight.detach()
        merged = weight + change(layer).detach().to(weight.dtype)
        more = gain(layer)
        if more is not None:
            merged = merged + merged * more.detach().to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))
        state[f"{name}.weight"] = merged
    return state
