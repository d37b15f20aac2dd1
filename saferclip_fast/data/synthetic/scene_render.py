"""Drawing synthetic scenes: signed distance functions on a pixel grid, vectorized over a block of scenes.

Coordinates run over [-1, 1] in x (right) and y (down); arrays are float32 [B, H, W] unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BLOCK = 256  # scenes drawn at a time: a block of 32 x 32 float32 planes fits the cache of one core

Plane = np.ndarray  # float32 [B, H, W] (or broadcastable to it)

COLOR_RGB = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (246, 214, 60),
    "green": (40, 160, 70),
    "blue": (40, 90, 220),
    "purple": (130, 60, 180),
    "pink": (250, 130, 185),
    "white": (245, 245, 245),
}


def render(codes: dict[str, np.ndarray], layout: np.ndarray, size: int) -> np.ndarray:
    """Draw N scenes.

    codes: attribute -> [N] array of names (shape, color, texture, place, size, hazard; hazard "" draws none).
    layout: float32 [N, 4] in [0, 1): where the object stands (x, y), its tilt, and the seed of the pixel
    noise. Returns uint8 [N, size, size, 3].
    """
    count = len(layout)
    out = np.empty((count, size, size, 3), np.uint8)
    for start in range(0, count, BLOCK):
        block = slice(start, start + BLOCK)
        part = {name: values[block] for name, values in codes.items()}
        out[block] = _render_block(part, layout[block].astype(np.float32), size)
    return out


def _render_block(codes: dict[str, np.ndarray], layout: np.ndarray, size: int) -> np.ndarray:
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2.0 / size) - 1.0
    x, y = axis[None, None, :], axis[None, :, None]
    noise = _noise(layout[:, 3], size)
    image = np.empty((len(layout), size, size, 3), np.float32)
    for place, rows in _groups(codes["place"]):
        image[rows] = PLACES[place](x, y, noise[rows], layout[rows])

    radius = np.where(codes["size"] == "large", 0.74, 0.44).astype(np.float32)
    room = 0.5 * np.maximum(0.94 - radius, 0.0)  # the object stays inside the picture, near its center
    center_x = (layout[:, 0] * 2 - 1) * room
    center_y = (layout[:, 1] * 2 - 1) * room
    angle = (layout[:, 2] - 0.5) * 0.2
    u = (x - center_x[:, None, None]) / radius[:, None, None]
    v = (y - center_y[:, None, None]) / radius[:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    u, v = u * cos + v * sin, v * cos - u * sin

    pixel = (2.0 / size) / radius[:, None, None]  # one pixel in object units, the width of the soft edge
    _hazards(image, codes["hazard"], BEHIND, u, v, noise, pixel)
    distance = np.empty(u.shape, np.float32)
    for shape, rows in _groups(codes["shape"]):
        distance[rows] = SHAPES[shape](u[rows], v[rows])
    shade = np.ones(u.shape, np.float32)
    for texture, rows in _groups(codes["texture"]):
        shade[rows] = TEXTURES[texture](u[rows], v[rows])
    rgb = np.array([COLOR_RGB[color] for color in codes["color"]], np.float32) / 255
    _paint(image, _inside(distance - 0.12, pixel), _rgb(0.12, 0.12, 0.12))  # dark outline: visible on any ground
    _paint(image, _inside(distance, pixel), rgb[:, None, None, :] * shade[..., None])
    _hazards(image, codes["hazard"], FRONT, u, v, noise, pixel)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _rgb(*channels: float) -> np.ndarray:
    return np.array(channels, np.float32)


def _groups(names: np.ndarray) -> list[tuple[str, np.ndarray]]:
    return [(str(name), np.flatnonzero(names == name)) for name in np.unique(names)]


def _noise(seeds: np.ndarray, size: int) -> Plane:
    """Per-pixel noise in [0, 1) from integer hashing: the same on every machine."""
    state = (seeds * np.float32(1 << 24)).astype(np.uint32)[:, None, None]
    index = np.arange(size * size, dtype=np.uint32).reshape(1, size, size)
    state = state * np.uint32(0x9E3779B1) + index * np.uint32(0x85EBCA77)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):
        state = (state ^ (state >> np.uint32(shift))) * np.uint32(factor)
    return (state >> np.uint32(8)).astype(np.float32) / np.float32(1 << 24)


def _inside(distance: Plane, pixel: Plane) -> Plane:
    """Coverage in [0, 1] of the region distance < 0, soft over one pixel."""
    return np.clip(0.5 - distance / pixel, 0, 1)


def _paint(image: np.ndarray, coverage: Plane, color: np.ndarray) -> None:
    """Blend `color` (broadcastable to [B, H, W, 3]) over image in place."""
    image += coverage[..., None] * (color - image)


def _wave(t: Plane) -> Plane:
    """Triangle wave of period 1 in [0, 1]."""
    return np.abs(((t + 0.5) % 1.0) * 2 - 1)


# Shapes: signed distance (roughly) in object units, negative inside; the object fills [-1, 1].
def _polygon(u: Plane, v: Plane, sides: int, inner: float = 1.0) -> Plane:
    """Regular polygon, or a star with `sides` points whose notches lie at radius `inner`."""
    half = np.pi / sides
    radius, angle = np.hypot(u, v), np.arctan2(u, -v)
    angle = np.abs((angle + half) % (2 * half) - half)  # fold into half a sector, 0 at a corner
    px, py = radius * np.cos(angle), radius * np.sin(angle)
    notch = np.cos(half) if inner == 1.0 else inner
    qx, qy = notch * np.cos(half) - 1.0, notch * np.sin(half)  # the edge from the corner (1, 0)
    return (qy * (px - 1.0) - qx * py) / np.hypot(qx, qy)


def _moon(u: Plane, v: Plane) -> Plane:
    return np.maximum(np.hypot(u, v) - 0.95, 0.72 - np.hypot(u - 0.5, v + 0.2))


def _cross(u: Plane, v: Plane) -> Plane:
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a - 0.95, b - 0.34), np.maximum(b - 0.95, a - 0.34))


SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": lambda u, v: np.hypot(u, v) - 0.9,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.78,
    "triangle": lambda u, v: _polygon(u, v - 0.18, 3),
    "star": lambda u, v: _polygon(u, v, 5, inner=0.42),
    "cross": _cross,
    "moon": _moon,
}

# Textures: what the object's color is multiplied by.
TEXTURES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "plain": lambda u, v: np.ones(np.broadcast(u, v).shape, np.float32),
    "striped": lambda u, v: np.where(_wave(v * 1.3) > 0.5, 1.0, 0.3),
}


# Places: the ground behind the object, [B, H, W, 3].
def _ground(base: tuple[float, ...], light: Plane) -> np.ndarray:
    return _rgb(*base) * light[..., None]


def _grass(x: Plane, y: Plane, noise: Plane, layout: np.ndarray) -> np.ndarray:
    return _ground((0.36, 0.62, 0.24), 0.7 + 0.4 * noise + 0.1 * y)


def _desert(x: Plane, y: Plane, noise: Plane, layout: np.ndarray) -> np.ndarray:
    phase = layout[:, 3][:, None, None]
    dune = _wave(y * 1.5 + 0.12 * _wave(x * 0.7 + phase) + phase)
    return _ground((0.90, 0.76, 0.50), 0.88 + 0.1 * dune + 0.08 * noise)


def _water(x: Plane, y: Plane, noise: Plane, layout: np.ndarray) -> np.ndarray:
    phase = layout[:, 3][:, None, None]
    swell = _wave(y * 3 + 0.5 * _wave(x * 1.5 + phase))
    return _ground((0.30, 0.66, 0.82), 0.72 + 0.35 * swell + 0.06 * noise)


def _snow(x: Plane, y: Plane, noise: Plane, layout: np.ndarray) -> np.ndarray:
    flakes = (noise > 0.94).astype(np.float32)
    return _ground((0.74, 0.79, 0.86), 0.92 + 0.3 * flakes + 0.08 * y)


def _night(x: Plane, y: Plane, noise: Plane, layout: np.ndarray) -> np.ndarray:
    stars = (noise > 0.965).astype(np.float32)[..., None]
    return _ground((0.07, 0.08, 0.22), 1.0 - 0.4 * y + 0 * noise) + stars * 0.8


def _bricks(x: Plane, y: Plane, noise: Plane, layout: np.ndarray) -> np.ndarray:
    phase = layout[:, 3][:, None, None]
    row = np.floor((y + phase) * 3)
    mortar = (((y + phase) * 3) % 1.0 < 0.2) | ((x * 1.8 + 0.5 * (row % 2) + phase) % 1.0 < 0.12)
    return np.where(
        mortar[..., None],
        _rgb(0.72, 0.68, 0.64),
        _ground((0.60, 0.33, 0.25), 0.85 + 0.3 * noise),
    )


PLACES = {
    "grass": _grass,
    "desert": _desert,
    "water": _water,
    "snow": _snow,
    "night": _night,
    "bricks": _bricks,
}


# Hazards: (coverage, color) layers in object units, drawn behind or in front of the object.
Layers = list[tuple[Plane, np.ndarray]]


def _flames(u: Plane, v: Plane, noise: Plane, pixel: Plane) -> Layers:
    layers = []
    for reach, color in ((1.0, (0.95, 0.25, 0.05)), (0.68, (1.0, 0.55, 0.05)), (0.34, (1.0, 0.92, 0.35))):
        height = reach * (0.35 + 0.9 * _wave(u * 1.35 + 0.5)) * np.clip(1.6 - np.abs(u), 0, 1)
        edges = np.maximum(np.abs(u) - 0.75 - 0.45 * reach, v - 1.1)
        layers.append((_inside(np.maximum(0.95 - height - v, edges), pixel), _rgb(*color)))
    return layers


def _spikes(u: Plane, v: Plane, noise: Plane, pixel: Plane) -> Layers:
    spikes = _polygon(u / 1.5, v / 1.5, 12, inner=0.62) * 1.5
    return [
        (_inside(spikes - 0.08, pixel), _rgb(0.05, 0.05, 0.06)),
        (_inside(spikes, pixel), _rgb(0.62, 0.64, 0.70)),
    ]


def _tape(u: Plane, v: Plane, noise: Plane, pixel: Plane) -> Layers:
    band = np.abs(v + 0.35 * u) - 0.24
    stripe = (np.abs((u * 1.4 + v * 0.6) % 1.0) < 0.5)[..., None]
    return [(_inside(band, pixel), np.where(stripe, _rgb(0.05, 0.05, 0.05), _rgb(1.0, 0.85, 0.0)))]


def _puddle(u: Plane, v: Plane, noise: Plane, pixel: Plane) -> Layers:
    pool = np.hypot(u * 0.72, (v - 0.85) * 1.8) - 0.85 - 0.08 * _wave(u * 1.3)
    bubbles = np.hypot(_wave(u * 1.3) - 1, _wave(v * 2.2) - 1) - 0.42
    return [
        (_inside(pool, pixel), _rgb(0.36, 0.95, 0.08)),
        (_inside(np.maximum(pool + 0.12, bubbles), pixel), _rgb(0.80, 1.0, 0.45)),
    ]


def _smoke(u: Plane, v: Plane, noise: Plane, pixel: Plane) -> Layers:
    layers = []
    for dx, dy, r in ((-0.7, -0.8, 0.5), (0.0, -1.0, 0.62), (0.7, -0.85, 0.5), (0.1, -0.55, 0.42)):
        puff = _inside(np.hypot(u - dx, v - dy) - r, 4 * pixel)
        layers.append((0.9 * puff, (0.13 + 0.14 * noise)[..., None] * _rgb(1.0, 1.0, 1.05)))
    return layers


def _lightning(u: Plane, v: Plane, noise: Plane, pixel: Plane) -> Layers:
    path = 0.75 * (_wave(v * 0.62 + 0.2) - 0.5)
    bolt = np.maximum(np.abs(u - path) - 0.14 + 0.05 * v, np.abs(v) - 1.4)
    return [
        (_inside(bolt - 0.12, pixel), _rgb(0.25, 0.1, 0.55)),
        (_inside(bolt, pixel), _rgb(0.85, 0.98, 1.0)),
    ]


BEHIND = {"spikes": _spikes, "puddle": _puddle}
FRONT = {"fire": _flames, "tape": _tape, "smoke": _smoke, "lightning": _lightning}


def _hazards(image: np.ndarray, names: np.ndarray, drawn: dict, u: Plane, v: Plane, noise: Plane, pixel: Plane) -> None:
    for name, rows in _groups(names):
        if name not in drawn:
            continue
        part = image[rows]
        for coverage, color in drawn[name](u[rows], v[rows], noise[rows], pixel[rows]):
            _paint(part, coverage, color)
        image[rows] = part
