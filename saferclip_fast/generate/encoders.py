"""A tuned encoder in the place of the one that is there, once it is certain that both are of one kind."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models import ClipModel
from ..models.huggingface import TEXT, VISION, to_hf
from ..sources import Source
from .folder import FROZEN, TUNED

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
SIZES = {TEXT: (*_SIZES, "vocab_size", "max_position_embeddings"), VISION: (*_SIZES, "image_size", "patch_size")}
HOLDERS = {TEXT: "pipeline", VISION: "model"}  # what holds an encoder of each kind
PROJECTION = "text_projection.weight"
# What a file's precision, and then the one it is opened in, make of a frozen weight.
ROUNDINGS = ((), (torch.float16,), (torch.bfloat16,), (torch.float16, torch.bfloat16))


class EncoderError(UserError, ValueError):
    """An encoder that cannot take the place of the one that is there."""


class Encoder:
    """The text or the image encoder of a CLIP, with the weights' names and the sizes that Hugging Face has for it."""

    def __init__(self, clip: ClipModel, kind: str = TEXT) -> None:
        """kind: TEXT or VISION. Raises Unsupported for a CLIP that Hugging Face's cannot express."""
        model = to_hf(clip)
        part = getattr(model, kind)
        self.kind, self.config = kind, part.config
        self.state: dict[str, Tensor] = dict(part.state_dict())
        if kind == TEXT:
            self.state[PROJECTION] = model.text_projection.weight.detach()

    def misfits(self, own: Any) -> list[str]:
        """Why this encoder cannot take the place of `own`, a module; nothing where it can."""
        if getattr(getattr(own, "config", None), "model_type", None) != f"clip_{self.kind}":
            return [f"a {type(own).__name__}, no CLIP's {self.kind.removesuffix('_model')} encoder"]
        found = [
            f"{name} {getattr(own.config, name)}, the run's {getattr(self.config, name)}"
            for name in SIZES[self.kind]
            if getattr(own.config, name) != getattr(self.config, name)
        ]
        theirs, ours = _weights(own).get(PROJECTION), self.state.get(PROJECTION)
        if theirs is not None and ours is not None and theirs.shape != ours.shape:
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
            f"{name} of the {HOLDERS[self.kind]} is not the model that {where} was tuned from (weights differ by up to "
            f"{far[worst]:.1e}, in {worst}): a difference would not be the tuning's alone; take a "
            f"{HOLDERS[self.kind]} with that encoder, or tune the encoder that is there"
        )


def choose(components: Mapping[str, Any], tuned: Encoder, wanted: str | None) -> str:
    """The name of the component that `tuned` can replace: `wanted`, else the only one that fits.

    Raises EncoderError, with what does not fit in each.
    """
    holder = HOLDERS[tuned.kind]
    if wanted is not None and wanted not in components:
        raise EncoderError(f"the {holder} has no {wanted}; its encoders are {', '.join(components) or 'none'}")
    asked = [wanted] if wanted is not None else list(components)
    misfits = {name: tuned.misfits(components[name]) for name in asked}
    fitting = [name for name, reasons in misfits.items() if not reasons]
    if len(fitting) > 1:
        raise EncoderError(f"the run's encoder fits {' and '.join(fitting)}: say which with --encoder")
    if not fitting:
        said = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in misfits.items())
        raise EncoderError(f"the run's encoder cannot replace one of the {holder}'s: {said or 'it has none'}")
    return fitting[0]


def both(
    components: Mapping[str, Any], source: Source, wanted: str | None, kind: str
) -> tuple[str, dict[str, nn.Module]]:
    """The name of the component to replace, and what stands there: what is there now, the frozen one, and the tuned.

    Raises EncoderError where none fits, or the one that is there is not the frozen model of the run.
    """
    tuned = Encoder(source.clip, kind)
    name = choose(components, tuned, wanted)
    own = components[name].eval()
    if source.run_dir is not None:
        Encoder(source.frozen(), kind).check_same(own, name, str(source.run_dir))
    return name, {FROZEN: own, TUNED: tuned.copy_of(own)}


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
