"""Tiny models with random weights that write texts for images, with the image encoder of a tiny CLIP."""

from pathlib import Path

import torch
from transformers import (
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    VisionEncoderDecoderModel,
)

from saferclip_fast.export.huggingface import hf_tokenizer
from saferclip_fast.models import ClipModel
from saferclip_fast.models.huggingface import hf_image_processor, to_hf

IMAGE = "<image>"


def tower_of(clip: ClipModel) -> CLIPVisionModel:
    """The image encoder alone."""
    return to_hf(clip).vision_model


def tiny_llava(clip: ClipModel, folder: Path, chat_template: str | None = None) -> Path:
    """Writes a LLaVA that sees with the image encoder of `clip`, with its processor."""
    tower, tokenizer = tower_of(clip), hf_tokenizer(clip)
    tokenizer.add_tokens(IMAGE, special_tokens=True)
    torch.manual_seed(1)
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.5,  # so that what is seen, and what was written, decides on the next word
    )
    token = tokenizer.convert_tokens_to_ids(IMAGE)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower.config, text_config=language, image_token_id=token)
    )
    model.model.vision_tower = tower
    model.save_pretrained(folder)
    LlavaProcessor(
        hf_image_processor(clip.preprocessing),
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    ).save_pretrained(folder)
    return folder


def tiny_captioner(clip: ClipModel, folder: Path) -> Path:
    """Writes an encoder-decoder that sees with the image encoder of `clip` and takes no question."""
    tower, tokenizer = tower_of(clip), hf_tokenizer(clip)
    torch.manual_seed(1)
    decoder = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=tower.config.hidden_size,
            n_layer=1,
            n_head=2,
            add_cross_attention=True,
            initializer_range=0.5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model = VisionEncoderDecoderModel(encoder=tower, decoder=decoder)
    model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    hf_image_processor(clip.preprocessing).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
