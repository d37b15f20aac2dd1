"""Quadruplets without unsafe images: the text encoder is trained alone."""

from __future__ import annotations

from ..models import ClipModel

SAID = (
    "text only: there are no unsafe images, so the text encoder alone is trained; the image encoder stays as it is, "
    "and nothing is learned or measured of how unsafe images are treated"
)


def freeze_images(clip: ClipModel) -> None:
    """Leave the image encoder as it is. `clip` has its trainable parameters set."""
    for name, parameter in clip.model.named_parameters():
        if name.startswith("visual."):
            parameter.requires_grad_(False)
