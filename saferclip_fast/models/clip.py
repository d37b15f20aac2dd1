"""CLIP models for safety fine-tuning: any open_clip model, LoRA or full, with a frozen twin and an export."""

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.tokenizer import HFTokenizer
from torch import nn

from ..data.captions import pad_id
from ..data.packed_captions import PackedCaptions, pack
from ..storage.files import save_json, save_tensors
from .attention import Place, packed_names, unpack_attention
from .blocks import run_transformer, trim_blocks
from .lora import CAPTIONING, adapters_off, add_lora, lora_layers, merged_state_dict, remove_lora

CONFIG_FOLDER = Path(__file__).parents[1] / "configs" / "models"
WEIGHTS_NAME = "open_clip_model.safetensors"
CONFIG_NAME = "open_clip_config.json"

open_clip.add_model_config(CONFIG_FOLDER)


class ClipModel(nn.Module):
    """An open_clip model with everything that belongs to it: preprocessing, tokenizer, identity, frozen twin."""

    def __init__(
        self, model: nn.Module, name: str, preprocess: Callable, tokenizer: Callable, config: dict[str, Any]
    ) -> None:
        """Use load_clip. `config` is the content of open_clip's config file: model_cfg and preprocess_cfg."""
        super().__init__()
        self.name = name
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.config = config
        self.pad_id = pad_id(tokenizer)
        text = _text_tower(model)
        # Hugging Face's towers could read hundreds of tokens (mT5 any number): a caption has what its tokenizer gives
        hf = isinstance(text, HFTextEncoder)
        reader: Any = tokenizer if hf else model
        self.context_length: int = reader.context_length
        self.masks_padding = hf and text.config.pad_token_id == self.pad_id
        # not MobileCLIP's, whose grouped convolutions end torch 2.14 with a segmentation fault in the backward pass
        self.channels_last = isinstance(model.visual, ModifiedResNet)
        self.trims_text = (
            hasattr(text, "attn_mask")
            and text.attn_mask is not None
            and getattr(text, "cls_emb", None) is None
            and _pooling(model) in ("argmax", "eos")
        )
        unpack_attention(model, text.transformer if self.trims_text else None)
        trim_blocks(model, text.transformer if self.trims_text else None)
        self.model: Any = model.requires_grad_(False).eval()
        # a list hides the twin from parameters(), state_dict() and train()
        self._twin: list[nn.Module] = []
        self.weights_hash = self.hash_weights()

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def preprocessing(self) -> dict[str, Any]:
        """open_clip's image preprocessing settings (size, mean, std, interpolation ...), JSON-able."""
        return self.config["preprocess_cfg"]

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W], preprocessed -> embeddings [B, d], not normalized."""
        if self.channels_last:  # a step of RN-small-32 takes 0.84 of the time on two cores with AVX-512
            images = images.contiguous(memory_format=torch.channels_last)
        return self.model.encode_image(images)

    def encode_text(self, text: torch.Tensor | PackedCaptions) -> torch.Tensor:
        """Token ids [N, L], L up to the context length, or packed captions -> embeddings [N, d], not normalized.

        A causal encoder that reads its end-of-text position gives the same embedding for tokens cut after
        the longest caption, and for packed ones, at a fraction of the cost; one that masks its padding for cut tokens.
        Others get the padding back.
        Raises ValueError for tokens longer than the context, or packed ones that the encoder cannot read.
        """
        tokens = text.tokens if isinstance(text, PackedCaptions) else text
        if tokens.shape[1] > self.context_length:
            raise ValueError(f"tokens have length {tokens.shape[1]}, {self.name} reads at most {self.context_length}")
        if self.trims_text:
            return self._encode_causal(text)
        if isinstance(text, PackedCaptions):
            raise ValueError(f"the text encoder of {self.name} is not causal and cannot read packed captions")
        return self.model.encode_text(text if self.masks_padding else self.padded(text))

    def padded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [N, L] with the padding that was cut off: [N, context length]."""
        return nn.functional.pad(tokens, (0, self.context_length - tokens.shape[1]), value=self.pad_id)

    def _encode_causal(self, text: torch.Tensor | PackedCaptions) -> torch.Tensor:
        encoder = _text_tower(self.model)
        if isinstance(text, PackedCaptions):
            tokens, position = text.tokens, encoder.positional_embedding[text.positions]
            mask, place = text.attention_mask(position.dtype), Place(text.ends, text.rows)
        else:
            tokens, position = text, encoder.positional_embedding[: text.shape[1]]
            mask, place = None, Place(self._ends(text))
        dtype = encoder.transformer.get_cast_dtype()
        x = encoder.token_embedding(tokens).to(dtype) + position.to(dtype)
        x = encoder.ln_final(run_transformer(encoder.transformer, x, mask, place))
        if encoder.text_projection is None:
            return x
        if isinstance(encoder.text_projection, nn.Linear):
            return encoder.text_projection(x)
        return x @ encoder.text_projection

    def pack(self, tokens: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor | PackedCaptions:
        """Tokens [N, L], of which row i needs its first lengths[i], packed if the text encoder can read them so."""
        return pack(tokens, lengths, self._ends(tokens), self.context_length) if self.trims_text else tokens

    def _ends(self, tokens: torch.Tensor) -> torch.Tensor:
        """Position [N] of the end-of-text token that a causal encoder reads, of tokens [N, L]."""
        end = tokens if _pooling(self.model) == "argmax" else (tokens == _eos_id(self.model)).int()
        return end.argmax(dim=-1)

    def forward(self, images: torch.Tensor, text: torch.Tensor | PackedCaptions) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [M, 3, H, W] and tokens [N, L] or N packed captions -> embeddings [M, d] and [N, d]."""
        return self.encode_image(images), self.encode_text(text)

    def train(self, mode: bool = True) -> "ClipModel":
        """Training mode; under LoRA only the adapters' dropout switches, the frozen base stays as evaluated."""
        adapters = lora_layers(self.model)
        super().train(mode and not adapters)
        if not any(parameter.requires_grad for parameter in self.model.visual.parameters()):
            self.model.visual.eval()  # no batch norm of a frozen encoder moves
        for layer in adapters.values():
            layer.lora_dropout.train(mode)
        return self

    def add_lora(
        self,
        rank: int = 16,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: Sequence[str] = ("all",),
        dora: bool = False,
        start: bool = False,
    ) -> "ClipModel":
        """Train adapters on both encoders, nothing else (see lora.add_lora). The frozen twin costs no memory."""
        add_lora(self.model, rank, alpha, dropout, targets, dora, start)
        return self

    def unfreeze(self, keep_frozen: bool = False) -> "ClipModel":
        """Train every weight but the logit scale and bias, which no objective here reads.

        Args:
            keep_frozen: keep a copy of the weights for frozen(); not needed where the frozen embeddings
                come from the cache, as in training.
        """
        if keep_frozen:
            self._twin = [copy.deepcopy(self.model)]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not name.startswith((CAPTIONING, "logit_scale", "logit_bias")))
        return self

    def freeze(self) -> "ClipModel":
        """Back to what load_clip gave, but for what steps did to the weights: no adapters, nothing to train."""
        remove_lora(self.model)
        self._twin = []
        self.model.requires_grad_(False)
        return self.eval()

    @contextlib.contextmanager
    def frozen(self) -> Iterator["ClipModel"]:
        """Inside, this object is the pre-trained model: adapters off, or the kept copy; no gradients.

        Raises RuntimeError where every weight is trained and none was kept.
        """
        trained, training = self.model, self.training or any(m.training for m in self.model.modules())
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if lora_layers(trained):
                stack.enter_context(adapters_off(trained))
            elif self._twin:
                self.model = self._twin[0].to(self.device)
            elif any(p.requires_grad for p in trained.parameters()):
                raise RuntimeError(
                    "no frozen weights are kept: call unfreeze(keep_frozen=True), or take the frozen "
                    "embeddings from embeddings.embed_quadruplets before training"
                )
            self.eval()
            try:
                yield self
            finally:
                self.model = trained
                self.train(training)

    def export(self, folder: str | Path, weights: Mapping[str, torch.Tensor] | None = None) -> Path:
        """Write the merged weights and the config where open_clip finds them; return the weights file.

        Load with open_clip.create_model(name, pretrained=FILE) or open_clip.create_model("local-dir:FOLDER").
        `weights`: what exported_state_dict() gives, where the model itself holds but a slice of each.
        """
        folder = Path(folder)
        save_tensors(folder / WEIGHTS_NAME, weights or self.exported_state_dict(), {"format": "pt"})
        save_json(folder / CONFIG_NAME, self.config)
        if isinstance(self.tokenizer, HFTokenizer):
            self.tokenizer.tokenizer.save_pretrained(str(folder))
        return folder / WEIGHTS_NAME

    def exported_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights as open_clip names them, adapters merged."""
        names = packed_names(self.model)
        return {names.get(name, name): tensor for name, tensor in merged_state_dict(self.model).items()}

    def hash_weights(self) -> str:
        """SHA-256 of the architecture and the weights, adapters merged: what caches are named by."""
        digest = hashlib.sha256(json.dumps(self.config["model_cfg"], sort_keys=True).encode())
        for name, tensor in sorted(self.exported_state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _text_tower(model: Any) -> Any:
    """The module that holds the text encoder's parts (open_clip's CLIP keeps them at the top level)."""
    return getattr(model, "text", model)


def _pooling(model: Any) -> str:
    return getattr(model, "text_pool_type", None) or getattr(_text_tower(model), "pool_type", None) or ""


def _eos_id(model: Any) -> int:
    return getattr(model, "text_eos_id", None) or _text_tower(model).eos_id
