"""One sample forward and backward, before anything slow: whether the model trains as it is asked to."""

from __future__ import annotations

import itertools

import torch
from PIL import Image
from torch import nn

from ..config import Config
from ..data import collate
from ..embeddings import embed_batch
from ..models import ClipModel
from .device import naming_train_deterministic
from .step import check_micro_batches
from .text_only import freeze_images


def set_trainable(config: Config, clip: ClipModel) -> None:
    """Adapters, or every weight, as the options say; of the text encoder alone where there are no unsafe images."""
    if config.model.tuning == "lora":
        options = config.lora
        start = options.init == "fisher"
        clip.add_lora(options.rank, options.alpha, options.dropout, options.targets, options.dora, start)
    else:
        clip.unfreeze()
    if config.data.text_only:
        freeze_images(clip)


def trial_step(config: Config, clip: ClipModel, world: int = 1) -> None:
    """Try a step on one sample. `clip`, still frozen, is afterwards as it was, and so is torch's generator.

    A gradient is dropped as soon as it is there, so that no more than one of them takes memory.

    Raises ValueError, naming the model and the option, for one that fails or leaves a trainable weight out, and what
    check_micro_batches raises for `world` ranks.
    """
    try:
        with torch.random.fork_rng(devices=[clip.device] if clip.device.type == "cuda" else []):
            set_trainable(config, clip)
            check_micro_batches(clip, config.train.micro_batch_size, config.train.batch_size, world)
            unused = _unused(config, clip)
    finally:
        clip.freeze()
    if unused:
        shown = ", ".join(itertools.islice(unused, 3))
        raise ValueError(
            f"{len(unused)} trainable weights of {clip.name} take no part in the embeddings ({shown} ...): "
            f"{_remedy(config)}"
        )


def _unused(config: Config, clip: ClipModel) -> list[str]:
    """Names of the trainable weights that get no gradient."""
    waiting: dict[nn.Parameter, str] = {p: name for name, p in clip.model.named_parameters() if p.requires_grad}

    def reached(parameter: torch.Tensor) -> None:
        waiting.pop(parameter, None)  # type: ignore[call-overload]
        parameter.grad = None

    hooks = [parameter.register_post_accumulate_grad_hook(reached) for parameter in waiting]
    image, text = clip.preprocess(Image.new("RGB", (64, 64), "gray")), "a dog"
    labels = {"index": 0, "unsafe_text_label": 1, "unsafe_image_label": 1}
    sample = {"safe_image": image, "unsafe_image": image, "safe_text": text, "unsafe_text": text, **labels}
    batch = collate(clip.tokenizer)([sample])
    try:
        with naming_train_deterministic():
            rows = embed_batch(clip, batch, config.train.precision)
            torch.stack([row.float().sum() for row in rows]).sum().backward()
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{clip.name} does not take a step with model.tuning={config.model.tuning} "
            f"({type(error).__name__}: {error!s:.200}): {_remedy(config)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return list(waiting.values())


def _remedy(config: Config) -> str:
    if config.model.tuning == "lora":
        return "choose other lora.targets for this model, or model.tuning=full"
    return "train adapters, model.tuning=lora"
