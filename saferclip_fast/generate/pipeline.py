"""A diffusion pipeline, and its images with one text encoder and the other, from the same noise."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from ..models.hub import asking_hub
from ..models.huggingface import quiet
from .folder import SIDES, Folder, Item
from .places import HUB
from .prompts import Prompt

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def open_pipeline(name: str, dtype: torch.dtype) -> Any:
    """A folder that save_pretrained wrote, or hf-hub:OWNER/NAME; its weights are read from safetensors alone.

    Raises ImportError, naming the remedy, without diffusers; OSError or ValueError for a pipeline that cannot be read.
    """
    try:
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging
    except ImportError as error:
        raise ImportError(
            f"generating images needs diffusers ({error}): pip install 'saferclip-fast[generate]'"
        ) from error
    logging.disable_progress_bar()
    on_hub = name.startswith(HUB)
    with asking_hub(name) if on_hub else contextlib.nullcontext(), quiet():
        pipeline = DiffusionPipeline.from_pretrained(
            name.removeprefix(HUB), torch_dtype=dtype, use_safetensors=True, local_files_only=not on_hub
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """The pipeline's text encoders by their names."""
    return {
        name: part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part is not None
    }


def check_call(pipeline: Any, words: Mapping[str, Any]) -> None:
    """Raises ValueError where the pipeline draws no image from a prompt, or does not take one of `words`."""
    known = inspect.signature(pipeline.__call__).parameters
    if not {"prompt", "generator", "num_inference_steps"} <= known.keys() or "image" in known:
        raise ValueError(
            f"{type(pipeline).__name__} does not draw images from a prompt alone: give a text-to-image pipeline"
        )
    if strange := [name for name in words if name not in known]:
        raise ValueError(f"{type(pipeline).__name__} does not take {', '.join(strange)}: leave that option out")


@contextlib.contextmanager
def without_checker(pipeline: Any, keep: bool) -> Iterator[None]:
    """Inside, the pipeline's safety checker is off, unless it is to be kept: what it blackens cannot be measured."""
    checker = getattr(pipeline, "safety_checker", None)
    if checker is None or keep:
        yield
        return
    pipeline.safety_checker = None
    try:
        yield
    finally:
        pipeline.safety_checker = checker


def seed_of(prompt: Prompt, item: Item, seed: int) -> int:
    """The seed of an image's noise: that of its prompt and the following ones, else drawn from `seed` and its place.

    It depends neither on the encoder nor on how many images are asked for.
    """
    if prompt.seed is not None:
        return prompt.seed + item.number
    return int(np.random.SeedSequence([seed, item.prompt, item.number]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@torch.no_grad()
def draw(
    pipeline: Any,
    encoders: Mapping[str, nn.Module],
    component: str,
    prompts: Sequence[Prompt],
    items: Sequence[Item],
    folder: Folder,
    words: Mapping[str, Any],
    seed: int,
    batch_size: int,
    progress: bool,
) -> None:
    """Make the images of `items` that `folder` lacks.

    Args:
        encoders: side -> what takes the place of the pipeline's `component`; that one is put back at the end.
        words: of the pipeline's call: steps, guidance, size.
    """
    own = getattr(pipeline, component)
    todo = {side: folder.missing(side, items) for side in SIDES}
    try:
        with tqdm(total=sum(map(len, todo.values())), desc="generate", unit="image", disable=not progress) as bar:
            for side in SIDES:
                setattr(pipeline, component, encoders[side])
                for start in range(0, len(todo[side]), batch_size):
                    block = todo[side][start : start + batch_size]
                    for item, image in zip(block, _images(pipeline, prompts, block, words, seed), strict=True):
                        folder.save(side, item, image)
                    bar.update(len(block))
    finally:
        setattr(pipeline, component, own)


def _images(
    pipeline: Any, prompts: Sequence[Prompt], block: Sequence[Item], words: Mapping[str, Any], seed: int
) -> list[Image.Image]:
    # on the CPU, so that every device draws the same noise
    noise = [torch.Generator().manual_seed(seed_of(prompts[item.prompt], item, seed)) for item in block]
    texts = [prompts[item.prompt].text for item in block]
    return pipeline(prompt=texts, generator=noise, output_type="pil", **words).images


def where(pipeline: Any) -> str:
    """What a pipeline calls the place that it was read from, without the folders above it."""
    name = str(getattr(pipeline, "name_or_path", "") or type(pipeline).__name__)
    return Path(name).name if Path(name).is_dir() else name
