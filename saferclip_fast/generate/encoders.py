"""A tuned encoder in the place of the one that a pipeline holds, once it is certain that both are of one kind."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models import ClipModel
from ..models.huggingface import TEXT, to_hf

SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("vocab_size", "max_position_embeddings"),
)
PROJECTION = "text_projection.weight"
# What a file's precision, and then the one it is opened in, make of a frozen weight.
ROUNDINGS = ((), (torch.float16,), (torch.bfloat16,), (torch.float16, torch.bfloat16))


class EncoderError(UserError, ValueError):
    """An encoder that cannot take the place of the pipeline's own."""


class Encoder:
    """The text encoder of a CLIP, with the weights' names and the sizes that Hugging Face has for it."""

    def __init__(self, clip: ClipModel) -> None:
        """Raises Unsupported for a CLIP that Hugging Face's cannot express."""
        model = to_hf(clip)
        self.config = model.config.text_config
        self.state: dict[str, Tensor] = dict(model.text_model.state_dict())
        self.state[PROJECTION] = model.text_projection.weight.detach()

    def misfits(self, own: Any) -> list[str]:
        """Why this encoder cannot take the place of `own`, a module of a pipeline; nothing where it can."""
        if getattr(getattr(own, "config", None), "model_type", None) != "clip_text_model":
            return [f"a {type(own).__name__}, no CLIP's text encoder"]
        found = [
            f"{name} {getattr(own.config, name)}, the run's {getattr(self.config, name)}"
            for name in SIZES
            if getattr(own.config, name) != getattr(self.config, name)
        ]
        theirs, ours = _weights(own).get(PROJECTION), self.state[PROJECTION]
        if theirs is not None and theirs.shape != ours.shape:
            found.append(f"projection {list(theirs.shape)}, the run's {list(ours.shape)}")
        return found

    def copy_of(self, own: nn.Module) -> nn.Module:
        """`own` once more, with these weights; its precision, device and configuration stay."""
        made = copy.deepcopy(own)
        made.load_state_dict({name: self.state[_plain(name)] for name in own.state_dict()})
        return made.eval()

    def check_same(self, own: nn.Module, name: str, where: str) -> None:
        """Raises EncoderError unless `own` holds these weights, as they are or rounded to half precision."""
        weights = _weights(own)
        if any(all(torch.equal(x, _rounded(self.state[key], way)) for key, x in weights.items()) for way in ROUNDINGS):
            return
        far = {key: float((x - self.state[key]).abs().max()) for key, x in weights.items()}
        worst = max(far, key=far.__getitem__)
        raise EncoderError(
            f"{name} of the pipeline is not the model that {where} was tuned from (weights differ by up to "
            f"{far[worst]:.1e}, in {worst}): a difference would not be the tuning's alone; take a pipeline with that "
            "encoder, or tune the pipeline's own"
        )


def choose(components: Mapping[str, Any], tuned: Encoder, wanted: str | None) -> str:
    """The name of the component that `tuned` can replace: `wanted`, else the only one that fits.

    Raises EncoderError, with what does not fit in each.
    """
    if wanted is not None and wanted not in components:
        raise EncoderError(f"the pipeline has no {wanted}; its encoders are {', '.join(components) or 'none'}")
    asked = [wanted] if wanted is not None else list(components)
    misfits = {name: tuned.misfits(components[name]) for name in asked}
    fitting = [name for name, reasons in misfits.items() if not reasons]
    if len(fitting) > 1:
        raise EncoderError(f"the run's encoder fits {' and '.join(fitting)}: say which with --encoder")
    if not fitting:
        said = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in misfits.items())
        raise EncoderError(f"the run's encoder cannot replace one of the pipeline's: {said or 'it has none'}")
    return fitting[0]


def hash_of(module: nn.Module) -> str:
    """SHA-256 of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(name: str) -> str:
    """A weight's name in the encoder alone, where a model with a projection puts the encoder's name before it."""
    return name.removeprefix(f"{TEXT}.")


def _weights(own: nn.Module) -> dict[str, Tensor]:
    return {_plain(name): x.detach().cpu().float() for name, x in own.state_dict().items()}


def _rounded(tensor: Tensor, way: tuple[torch.dtype, ...]) -> Tensor:
    for dtype in way:
        tensor = tensor.to(dtype)
    return tensor.float()
