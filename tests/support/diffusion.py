"""A tiny diffusion pipeline with random weights and the text encoder of a tiny CLIP."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging
from transformers import CLIPTextModel

from saferclip_fast.export.huggingface import hf_tokenizer
from saferclip_fast.models import ClipModel
from saferclip_fast.models.huggingface import to_hf


def text_encoder_of(clip: ClipModel) -> CLIPTextModel:
    """The text encoder alone."""
    return to_hf(clip).text_model


def tiny_pipeline(clip: ClipModel, folder: Path) -> Path:
    """Writes a Stable Diffusion of 32 x 32 pixels that reads prompts with the text encoder of `clip`."""
    logging.disable_progress_bar()
    encoder = text_encoder_of(clip)
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=32),
        unet=UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=encoder.config.hidden_size,
            norm_num_groups=8,
        ),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        text_encoder=encoder,
        tokenizer=hf_tokenizer(clip),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
