"""A Stable Diffusion 1.x pipeline whose text encoder is the safer one; needs diffusers and the extra `export`.

    python examples/diffusion_text_encoder.py

Export writes the text encoder as a CLIPTextModel, which is what such a pipeline reads its prompts with. Here all
networks are small, have random weights and are built on the spot, so the pictures are noise. With real ones, two lines
remain:

    encoder = CLIPTextModel.from_pretrained("exports/visu/huggingface/text_model")
    pipe = StableDiffusionPipeline.from_pretrained("CompVis/stable-diffusion-v1-4", text_encoder=encoder)

The run must have started from the pipeline's own text encoder (ViT-L-14-quickgelu, openai, for Stable Diffusion 1.x).
Keep the pipeline's safety checker: this tiny one has none because it draws noise.
"""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging
from transformers import CLIPTextModel, CLIPTokenizer

from saferclip_fast.export import export, load_source
from saferclip_fast.models import load_clip

logging.disable_progress_bar()
torch.manual_seed(0)

# two exports, as `python -m saferclip_fast.export RUN --format huggingface --alpha 0` and without --alpha write them;
# a little noise stands in for training
clip = load_clip("ViT-tiny-8-32")
clip.export("frozen")
with torch.no_grad():
    for weight in clip.model.parameters():
        weight.add_(0.05 * torch.randn_like(weight))
clip.export("tuned")
for name in ("frozen", "tuned"):
    export(load_source(name), ["huggingface"], f"exports/{name}", overwrite=True)

# a pipeline on the disk, with the frozen text encoder
frozen = CLIPTextModel.from_pretrained("exports/frozen/huggingface/text_model")
StableDiffusionPipeline(
    vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=32),
    unet=UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=frozen.config.hidden_size,
        norm_num_groups=8,
    ),
    scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    text_encoder=frozen,
    tokenizer=CLIPTokenizer.from_pretrained("exports/frozen/huggingface/text_model"),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
).save_pretrained("diffusion")

# the same pipeline with the tuned one: this is all that plugging in takes
tuned = CLIPTextModel.from_pretrained("exports/tuned/huggingface/text_model")
pictures = {}
for name, replaced in (("frozen", {}), ("tuned", {"text_encoder": tuned})):
    pipe = StableDiffusionPipeline.from_pretrained("diffusion", **replaced)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pictures[name] = pipe("a dog in the park", num_inference_steps=3, generator=generator, output_type="pt").images

    # the embedding that the pipeline's encoder makes is that of the exported model
    tokens = pipe.tokenizer("a dog in the park", padding="max_length", return_tensors="pt").input_ids
    own = load_source(name).clip
    with torch.no_grad():
        found = pipe.text_encoder(tokens).pooler_output @ own.model.text_projection
        difference = (found - own.encode_text(own.tokenizer(["a dog in the park"]))).abs().max()
    print(f"{name}: prompt embedding differs from the exported model's by {difference:.1e}")
    assert difference < 1e-5

change = (pictures["tuned"] - pictures["frozen"]).abs().mean()
print(f"pictures {tuple(pictures['tuned'].shape)}, mean change of a pixel by the text encoder {change:.4f}")
assert change > 0
