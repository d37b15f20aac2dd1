"""Both encoders as ONNX files, for runtimes without Python or PyTorch."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models import ClipModel
from ..storage.files import save_json

IMAGE, TEXT = "image_encoder.onnx", "text_encoder.onnx"
OUTPUT = "clip_embedding"  # "embedding" is taken by a node inside the text encoder
PREPROCESSING = "preprocessing.json"
_ONE_FILE = 1 << 30  # bytes; protobuf allows 2 GiB, larger models keep their weights in FILE.data


class _Encoder(nn.Module):
    def __init__(self, clip: ClipModel) -> None:
        super().__init__()
        self.clip = clip


class ImageEncoder(_Encoder):
    """Images float32 [B, 3, H, W] -> embeddings [B, d]."""

    def forward(self, images: Tensor) -> Tensor:
        return self.clip.encode_image(images)


class TextEncoder(_Encoder):
    """Tokens int64 [B, context length] -> embeddings [B, d]."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.clip.encode_text(tokens)


def save_onnx(clip: ClipModel, folder: Path) -> None:
    """Writes the encoders: images float32 [B, 3, H, W] or tokens int64 [B, context length] -> embedding [B, d].

    Embeddings are not normalized. B is free. preprocessing.json holds open_clip's image settings and the context
    length.

    Raises ImportError, naming the extra, without the onnx packages.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'saferclip-fast[export]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    images, tokens = torch.zeros(2, 3, *_size(clip)), clip.tokenizer(["a", "b"])
    large = sum(p.numel() * p.element_size() for p in clip.parameters()) > _ONE_FILE
    for encoder, inputs, name, file in (
        (ImageEncoder(clip), images, "images", IMAGE),
        (TextEncoder(clip), tokens, "tokens", TEXT),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations
            torch.onnx.export(
                encoder.eval(),
                (inputs,),
                str(folder / file),
                dynamo=True,
                verbose=False,
                input_names=[name],
                output_names=[OUTPUT],
                dynamic_shapes={name: {0: "batch"}},
                external_data=large,
            )
    save_json(folder / PREPROCESSING, {**clip.preprocessing, "context_length": clip.context_length})


def run_onnx(folder: Path, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings [M, d] and [N, d] of `images` [M, 3, H, W] and `tokens` [N, L], by onnxruntime on the CPU."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("onnxruntime is not installed: pip install 'saferclip-fast[export]'") from error
    found = []
    for file, name, values in ((IMAGE, "images", images), (TEXT, "tokens", tokens)):
        session = onnxruntime.InferenceSession(str(folder / file), providers=["CPUExecutionProvider"])
        found.append(torch.from_numpy(session.run([OUTPUT], {name: values.numpy()})[0]))
    return found[0], found[1]


def _size(clip: ClipModel) -> tuple[int, int]:
    size = clip.preprocessing["size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])
