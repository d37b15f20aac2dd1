"""From an image to the tensor that a model reads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

Transform = Callable[[Image.Image], torch.Tensor]


class ToTensor:
    """Transform: RGB image -> float32 [3, H, W], pixel / 255, then (x - mean) / std per channel.

    For images that already have the model's size (scenes, 32 x 32 photographs); open_clip's transforms, which
    resize and crop as well, can be used in its place.
    """

    def __init__(self, mean: tuple[float, ...] = (0.0, 0.0, 0.0), std: tuple[float, ...] = (1.0, 1.0, 1.0)):
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)

    def __repr__(self) -> str:  # caches of embeddings are keyed by it
        return f"ToTensor(mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()})"

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
        return (pixels.float() / 255 - self.mean) / self.std
