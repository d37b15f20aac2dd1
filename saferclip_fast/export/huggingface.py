"""A model as a Hugging Face folder: weights, tokenizer, image processor, and each encoder alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models import ClipModel
from ..models.huggingface import TEXT, VISION, hf_image_processor, quiet, to_hf

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import CLIPTokenizer


def save_hf(clip: ClipModel, folder: Path) -> None:
    """Writes a CLIPModel folder with tokenizer and image processor, and its two encoders as folders of their own.

    FOLDER/text_model is a CLIPTextModel (what Stable Diffusion 1.x reads), FOLDER/vision_model a CLIPVisionModel (what
    LLaVA reads).
    """
    from transformers import CLIPTextModel, CLIPVisionModel

    model, tokenizer, processor = to_hf(clip), hf_tokenizer(clip), hf_image_processor(clip.preprocessing)
    for model_class, files, name in (
        (None, (tokenizer, processor), ""),
        (CLIPTextModel, (tokenizer,), TEXT),
        (CLIPVisionModel, (processor,), VISION),
    ):
        with quiet():
            # read back from the whole model's folder, the weights keep the names that every reader knows
            part = model if model_class is None else model_class.from_pretrained(folder)
            part.save_pretrained(folder / name)
        for file in files:
            file.save_pretrained(folder / name)
        if tokenizer in files:
            tokenizer.backend_tokenizer.model.save(str(folder / name))  # vocab.json and merges.txt for older readers


def hf_tokenizer(clip: ClipModel) -> CLIPTokenizer:
    """open_clip's BPE vocabulary as a CLIPTokenizer: the same ids, but padded with <|endoftext|> as usual there."""
    from transformers import CLIPTokenizer

    own: Any = clip.tokenizer
    vocabulary = dict(own.encoder)
    for ours, theirs in (("<start_of_text>", "<|startoftext|>"), ("<end_of_text>", "<|endoftext|>")):
        vocabulary[theirs] = vocabulary.pop(ours)
    merges = sorted(own.bpe_ranks, key=own.bpe_ranks.__getitem__)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=clip.context_length)
