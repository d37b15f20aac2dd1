"""A transformers model that writes a text for an image, seen through one image encoder or another."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from ..data.images import ImageFile
from ..generate.folder import SIDES
from ..generate.places import HUB
from ..models.hub import asking_hub
from ..models.huggingface import quiet
from .texts import Texts

PLAIN = "vision-encoder-decoder"  # it takes an image and no question, and has no processor of its own


class Writer:
    """Image in, text out, greedy: the same image gives the same text, so that what differs is the encoder's doing."""

    model: Any

    def __init__(self, name: str, question: str, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        """
        Args:
            name: a folder that save_pretrained wrote, or hf-hub:OWNER/NAME; weights are read from safetensors alone.
            question: what the model is asked of an image, where it takes a question.
            tokens: of a text, at most.

        Raises ImportError, naming the remedy, without transformers; OSError or ValueError for a model that cannot be
        read or does not write texts for images.
        """
        try:
            from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as KNOWN
            from transformers import (
                AutoConfig,
                AutoImageProcessor,
                AutoModelForImageTextToText,
                AutoProcessor,
                AutoTokenizer,
            )
        except ImportError as error:
            raise ImportError(
                f"describing images needs transformers ({error}): pip install 'saferclip-fast[generate]'"
            ) from error
        on_hub, place = name.startswith(HUB), name.removeprefix(HUB)
        local: dict[str, Any] = {"local_files_only": not on_hub}
        with asking_hub(name) if on_hub else contextlib.nullcontext(), quiet():
            config = AutoConfig.from_pretrained(place, **local)
            if type(config) not in KNOWN:
                raise ValueError(
                    f"{name} is a {config.model_type} model, which writes no texts for images: give one that "
                    "AutoModelForImageTextToText of transformers reads, e.g. a LLaVA"
                )
            if config.model_type == PLAIN:
                self.processor = AutoImageProcessor.from_pretrained(place, **local)
                self.tokenizer = AutoTokenizer.from_pretrained(place, **local)
            else:
                self.processor = AutoProcessor.from_pretrained(place, **local)
                self.tokenizer = self.processor.tokenizer
            words = {"dtype": dtype, "use_safetensors": True, **local}
            self.model = AutoModelForImageTextToText.from_pretrained(place, **words).eval()
        self.model.to(device)
        self.tokenizer.padding_side = "left"  # the text goes on where the question ends
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.question = None if config.model_type == PLAIN else self._asked(question)
        self.tokens = tokens

    def encoders(self) -> dict[str, nn.Module]:
        """The CLIP's image encoders in the model, by their names."""
        from transformers import CLIPVisionModel

        return {name: part for name, part in self.model.named_modules() if isinstance(part, CLIPVisionModel)}

    @torch.no_grad()
    def write(self, images: Sequence[Image.Image]) -> list[str]:
        """The text of each RGB image."""
        asked = {} if self.question is None else {"text": [self.question] * len(images), "padding": True}
        inputs = self.processor(images=list(images), return_tensors="pt", **asked)
        inputs = inputs.to(self.model.device, self.model.dtype)
        with quiet():  # of options for drawing at random, which a model's own settings may have
            found = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=self.tokens)
        if "input_ids" in inputs:
            found = found[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(found, skip_special_tokens=True)]

    def _asked(self, question: str) -> str:
        """The question as the model was taught to read it, with the image's place in it."""
        if not self.processor.chat_template:
            return f"{getattr(self.processor, 'image_token', '')}\n{question}"  # not all have a token for it
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def write_texts(
    writer: Writer,
    encoders: Mapping[str, nn.Module],
    name: str,
    images: Sequence[ImageFile],
    names: Sequence[str],
    kept: Texts,
    batch_size: int,
    progress: bool,
) -> None:
    """Write the texts that `kept` lacks.

    Args:
        encoders: side -> what takes the place of the model's part `name`.
        images, names: the images, and how `kept` calls them.
    """
    todo = {side: kept.missing(side, names) for side in SIDES}
    with tqdm(total=sum(map(len, todo.values())), desc="describe", unit="text", disable=not progress) as bar:
        for side in SIDES:
            writer.model.set_submodule(name, encoders[side])
            for start in range(0, len(todo[side]), batch_size):
                block = todo[side][start : start + batch_size]
                texts = writer.write([images[place].load() for place in block])
                kept.add(side, {names[place]: text for place, text in zip(block, texts, strict=True)})
                bar.update(len(block))
