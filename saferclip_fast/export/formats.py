"""A fine-tuned model in the formats that other software reads, each read back and compared before it counts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..models.huggingface import Unsupported, quiet
from ..sources import Source, load_source
from ..storage.files import sync
from .huggingface import save_hf
from .model_card import BASE_FOLDER, write_card
from .onnx_files import run_onnx, save_onnx
from .peft_adapter import load_adapter, save_adapter

__all__ = ["FORMATS", "ExportError", "Source", "Unsupported", "export", "load_source"]

TOLERANCE = 1e-4  # of unit embeddings; float32 rounding over 24 layers stays below, a wrong activation is 1e-2
_TEXTS = ("a dog", "two people on a bench, in the park: it's raining", "x")

Embeddings = tuple[Tensor, Tensor]


class ExportError(RuntimeError):
    """The exported files do not compute what the model computes; they were removed."""


class Format(NamedTuple):
    write: Callable[[Source, Path], Any]
    read: Callable[[Source, Path, Tensor, Tensor], Embeddings]  # by the format's own library


def export(
    source: Source,
    formats: Sequence[str],
    out: str | Path,
    overwrite: bool = False,
    on_error: Callable[[str, Exception], None] | None = None,
) -> dict[str, float]:
    """Writes OUT/FORMAT for every one of `formats`, and a model card (README.md) in each and, for all, in OUT.

    Each is written to a temporary folder, read back by its own library, compared with the model on a few inputs, and
    only then renamed. One that fails leaves those that are finished, and what OUT/FORMAT held before.

    Args:
        overwrite: replace OUT/FORMAT where it is there.
        on_error: called with a format's name and what it raised, and the next format goes on; without it, that is
            raised.

    Returns the largest difference of any coordinate of the unit embeddings, by format that was written.

    Raises:
        FileExistsError: OUT/FORMAT is there and `overwrite` is false; nothing was written.
        ValueError: OUT holds formats of other weights that would stay; nothing was written.
        FrozenModelError: for peft, another frozen model than the run was tuned from; nothing was written.
        Unsupported: a format that this model or source does not have.
        ImportError: a package is missing; the message names the extra.
        ExportError: what was written computes something else.
    """
    out = Path(out)
    _check_place(source, formats, out, overwrite)
    if "peft" in formats and source.has_adapters:
        source.frozen()  # opened once before anything is written: it may be another one than the run's
    differences = {}
    try:
        for name in tqdm(formats, desc="export", unit="format"):
            try:
                differences[name] = _export_one(source, name, out)
            except Exception as error:
                if on_error is None:
                    raise
                on_error(name, error)
    finally:
        there = [name for name in FORMATS if (out / name).is_dir()]
        if there:
            write_card(source, there, out, in_subfolders=True)
    return differences


def _export_one(source: Source, name: str, out: Path) -> float:
    partial = out / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a killed export
    try:
        partial.mkdir(parents=True)
        FORMATS[name].write(source, partial)
        difference = compare(source, name, partial)
        write_card(source, [name], partial, in_subfolders=False)
        _put_in_place(partial, out / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return difference


def _check_place(source: Source, formats: Sequence[str], out: Path, overwrite: bool) -> None:
    """Whether OUT can take `formats`. What a killed export had set aside goes back to its place first."""
    for folder in (out / name for name in FORMATS):
        if folder.exists():
            shutil.rmtree(_aside(folder), ignore_errors=True)
        elif _aside(folder).is_dir():
            _aside(folder).rename(folder)
    taken = [str(out / name) for name in formats if (out / name).exists()]
    if taken and not overwrite:
        raise FileExistsError(f"{', '.join(taken)} exists already: choose another --out, or pass --overwrite")
    for name in FORMATS:
        card = out / name / "README.md"
        if name not in formats and card.is_file() and source.clip.weights_hash not in card.read_text("utf-8"):
            raise ValueError(
                f"{out / name} was made from other weights, and a folder holds one model: choose another --out"
            )


def _put_in_place(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`. A crash at any moment leaves the old folder or the new one whole, or both."""
    for path in (*new.rglob("*"), new):
        sync(path)
    aside = _aside(folder)
    if folder.exists():
        folder.rename(aside)
    new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


@torch.no_grad()
def compare(source: Source, name: str, folder: Path) -> float:
    """Largest difference between the unit embeddings of `folder`, read as format `name`, and those of the model.

    Raises ExportError above TOLERANCE.
    """
    clip = source.clip
    size = clip.preprocessing["size"]
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(0))
    tokens = clip.tokenizer(list(_TEXTS))
    found = FORMATS[name].read(source, folder, images, tokens)
    wanted = clip(images, tokens)
    pairs = zip(found, wanted, strict=True)
    difference = max(float((F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).abs().max()) for a, b in pairs)
    if not difference <= TOLERANCE:  # NaN counts as different
        raise ExportError(
            f"{name}: read back, embeddings differ by {difference:.1e} (at most {TOLERANCE:g} is allowed)"
        )
    return difference


def _read_open_clip(source: Source, folder: Path, images: Tensor, tokens: Tensor) -> Embeddings:
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    return model.encode_image(images), model.encode_text(tokens)


def _read_hf(source: Source, folder: Path, images: Tensor, tokens: Tensor) -> Embeddings:
    from transformers import CLIPModel

    with quiet():
        return _hf_embeddings(CLIPModel.from_pretrained(folder).eval(), images, tokens)


def _write_peft(source: Source, folder: Path) -> None:
    adapted, frozen = source.adapted(), source.frozen()
    save_adapter(frozen, adapted, source.alpha, source.base_on_the_hub, folder)
    if source.base_on_the_hub is None:
        save_hf(frozen, folder / BASE_FOLDER)


def _read_peft(source: Source, folder: Path, images: Tensor, tokens: Tensor) -> Embeddings:
    return _hf_embeddings(load_adapter(source.frozen(), folder), images, tokens)


def _hf_embeddings(model: Any, images: Tensor, tokens: Tensor) -> Embeddings:
    output = model(pixel_values=images, input_ids=tokens)
    return output.image_embeds, output.text_embeds


FORMATS = {
    "open_clip": Format(lambda source, folder: source.clip.export(folder), _read_open_clip),
    "huggingface": Format(lambda source, folder: save_hf(source.clip, folder), _read_hf),
    "peft": Format(_write_peft, _read_peft),
    "onnx": Format(
        lambda source, folder: save_onnx(source.clip, folder),
        lambda source, folder, images, tokens: run_onnx(folder, images, tokens),
    ),
}
