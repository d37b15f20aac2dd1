"""Zero-shot classification with prompt templates, as CLIP does it (Radford et al., 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.labeled import LabeledImages, template_lines
from ..embeddings import embed_images, embed_texts
from ..models import ClipModel
from .metrics import Metric, zero_shot_hits

Template = str | Callable[[str], str]  # text with {} for the class name, or a function of it

TEMPLATES: dict[str, Sequence[Template]] = {
    "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,  # 80
    "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,  # 7
}


def read_templates(name: str) -> Sequence[Template]:
    """Prompt templates by name ("openai", "simple"), or the lines of a text file, each with {} for the class name.

    Raises FileNotFoundError, or DataError for a line without {}.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"templates {name!r}: neither {' nor '.join(TEMPLATES)} nor a text file")
    return template_lines(path)


def class_embeddings(clip: ClipModel, names: Sequence[str], templates: Sequence[Template], **options: Any) -> Tensor:
    """[classes, d] unit rows: the normalized mean of each class's normalized prompt embeddings.

    options: batch_size, precision, progress and name of embeddings.embed_texts.
    """
    prompts = [
        template(name) if callable(template) else template.replace("{}", name)  # format() would read other braces
        for name in names
        for template in templates
    ]
    embeddings = F.normalize(embed_texts(clip, prompts, **options), dim=-1).view(len(names), len(templates), -1)
    return F.normalize(embeddings.mean(1), dim=-1)


@torch.no_grad()
def accuracy(
    clip: ClipModel,
    images: LabeledImages,
    templates: Sequence[Template] | None = None,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    precision: str = "fp32",
    progress: bool = True,
) -> Metric:
    """Top-1 zero-shot accuracy on `images`.

    templates: by default the data set's own, or open_clip's 80 of OpenAI where it has none.
    """
    chosen = templates or images.templates or TEMPLATES["openai"]
    options: dict[str, Any] = {"batch_size": batch_size, "precision": precision, "progress": progress}
    classes = class_embeddings(clip, images.class_names, chosen, name=f"{images.name} classes", **options)
    embeddings, labels = embed_images(
        clip, images.open(clip.preprocess), num_workers=num_workers, name=images.name, **options
    )
    hits = zero_shot_hits(embeddings, labels, classes)
    return Metric(f"zero-shot accuracy on {images.name}", "stays", hits, chance=1 / len(classes))
