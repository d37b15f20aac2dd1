"""Hazard signs: small drawings that make a photograph's "unsafe" version, harmless by design."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SIGNS = ("warning sign", "radiation sign", "fire sign", "stop sign")
_CANVAS = 256  # drawn large and scaled down, which gives smooth edges

YELLOW, RED, BLACK, WHITE = (255, 212, 0, 255), (214, 30, 30, 255), (16, 16, 16, 255), (255, 255, 255, 255)


def _regular(sides: int, radius: float, turn: float) -> list[tuple[float, float]]:
    """Corners of a regular polygon around the center of the canvas; `turn` in sides."""
    angles = [2 * math.pi * (corner + turn) / sides for corner in range(sides)]
    return [(128 + radius * math.sin(angle), 128 - radius * math.cos(angle)) for angle in angles]


def _warning(draw: ImageDraw.ImageDraw) -> None:
    draw.polygon([(128, 8), (250, 232), (6, 232)], fill=BLACK)
    draw.polygon([(128, 46), (216, 212), (40, 212)], fill=YELLOW)
    draw.polygon([(112, 90), (144, 90), (137, 160), (119, 160)], fill=BLACK)
    draw.ellipse([113, 170, 143, 200], fill=BLACK)


def _radiation(draw: ImageDraw.ImageDraw) -> None:
    draw.ellipse([6, 6, 250, 250], fill=BLACK)
    draw.ellipse([22, 22, 234, 234], fill=YELLOW)
    for start in (0, 120, 240):
        draw.pieslice([42, 42, 214, 214], start, start + 60, fill=BLACK)
    draw.ellipse([98, 98, 158, 158], fill=YELLOW)
    draw.ellipse([110, 110, 146, 146], fill=BLACK)


def _fire(draw: ImageDraw.ImageDraw) -> None:
    draw.polygon(_regular(4, 126, 0), fill=WHITE)
    draw.polygon(_regular(4, 114, 0), fill=RED)
    draw.polygon(
        [
            (128, 52),
            (160, 104),
            (176, 92),
            (186, 146),
            (164, 182),
            (92, 182),
            (70, 146),
            (84, 104),
            (104, 122),
        ],
        fill=WHITE,
    )


def _stop(draw: ImageDraw.ImageDraw) -> None:
    draw.polygon(_regular(8, 128, 0.5), fill=WHITE)
    draw.polygon(_regular(8, 114, 0.5), fill=RED)
    draw.rectangle([58, 106, 198, 150], fill=WHITE)


_DRAWINGS = dict(zip(SIGNS, (_warning, _radiation, _fire, _stop), strict=True))


@lru_cache(maxsize=256)
def sign_image(name: str, size: int) -> np.ndarray:
    """float32 RGBA [size, size, 4] in [0, 1] of the sign called `name` (one of SIGNS)."""
    image = Image.new("RGBA", (_CANVAS, _CANVAS), (0, 0, 0, 0))
    _DRAWINGS[name](ImageDraw.Draw(image))
    pixels = np.asarray(image, np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]  # scaled with premultiplied alpha, so that no dark fringe appears
    planes = [Image.fromarray(pixels[..., channel]).resize((size, size), Image.Resampling.BOX) for channel in range(4)]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def composite(photo: np.ndarray, name: str, size: int, left: int, top: int) -> np.ndarray:
    """A copy of uint8 photo [H, W, 3] with the sign of `size` pixels at (left, top), which must fit
    inside."""
    sign = sign_image(name, size)
    out = photo.astype(np.float32)
    area = out[top : top + size, left : left + size]
    area *= 1 - sign[..., 3:]
    area += 255 * sign[..., :3]
    return (out + 0.5).astype(np.uint8)
