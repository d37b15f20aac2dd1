"""Every architecture that open_clip lists, made small: loaded, trained a step, exported, read back, or refused by name.

make families                                            # all; writes the table in docs/models.md
.venv/bin/python -m tests.models.families NAME ...        # some, to the screen; --onnx: ONNX too
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch

from saferclip_fast.cli import MISTAKES
from saferclip_fast.config import load_config
from saferclip_fast.export.formats import export
from saferclip_fast.sources import load_source
from saferclip_fast.train import train

from .small import SIZE, small_timm, write_small

FORMATS = ("open_clip", "huggingface", "peft")  # and "onnx", which takes ten times as long, with --onnx
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families -->", "<!-- /families -->"
CAPTIONS = ["a dog", "two people on a bench"]


class Result(NamedTuple):
    """What became of one architecture: of each trial nothing where it works, else why not."""

    names: list[str]  # architectures that are the same when they are small
    image: str
    text: str
    trials: dict[str, str]  # "lora", "full", and each of FORMATS


def try_family(file: Path, folder: Path, formats: Iterable[str] = FORMATS) -> dict[str, str]:
    """What each trial of the architecture `file` says: nothing, or the reason of a refusal.

    Raises whatever is no refusal: what no user could mend.
    """
    trials = {}
    for tuning in ("lora", "full"):
        run_dir = folder / f"{file.stem}-{tuning}"
        try:
            _train(file, run_dir, folder / "cache", tuning)
        except MISTAKES as error:
            trials[tuning] = _reason(file, error)
            continue
        trials[tuning] = ""
        source = load_source(run_dir)
        assert not torch.equal(*(_embed(clip) for clip in (source.clip, source.frozen()))), f"{tuning} moved nothing"
        told: dict[str, Exception] = {}
        export(
            source, list(formats) if tuning == "lora" else ["open_clip"], run_dir / "export", on_error=told.__setitem__
        )
        for name, error in told.items():
            if not isinstance(error, MISTAKES):
                raise error
            trials[name] = _reason(file, error)
        if tuning == "full" and told:
            raise next(iter(told.values()))
    return trials


def survey(names: Iterable[str], folder: Path, formats: Iterable[str]) -> Iterable[Result]:
    """Every one of `names`, those that are the same when small together."""
    same: dict[str, list[str]] = {}
    for name in names:
        same.setdefault(write_small(name, folder / "models").read_text(), []).append(name)
    for content, group in same.items():
        config = json.loads(content)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trials = try_family(folder / "models" / f"small-{group[0]}.json", folder, formats)
        original = open_clip.get_model_config(group[0])["text_cfg"]
        yield Result(group, _image_encoder(config), _text_encoder(config, original), trials)


def shipped() -> list[str]:
    """The architectures that open_clip brings, without those that others have added."""
    return sorted(file.stem for file in (Path(open_clip.__file__).parent / "model_configs").glob("*.json"))


def table(results: Iterable[Result]) -> str:
    """The results as Markdown, with what is refused below."""
    lines = [
        "| architectures | image encoder | text encoder | adapters | every weight | exports |",
        "|---|---|---|---|---|---|",
    ]
    reasons: dict[str, int] = {}

    def mark(reason: str) -> str:
        return f"no ({reasons.setdefault(reason, len(reasons) + 1)})" if reason else "yes"

    rows: dict[tuple, list[str]] = {}  # those that differ in sizes alone are one
    for names, image, text, trials in results:
        rows.setdefault((image, text, tuple(sorted(trials.items()))), []).extend(names)
    for (image, text, told), names in rows.items():
        trials = dict(told)
        exports = ", ".join(name if not trials.get(name) else f"{name}: {mark(trials[name])}" for name in FORMATS)
        tuned = f"{mark(trials['lora'])} | {mark(trials['full'])}"
        lines.append(f"| {', '.join(sorted(names))} | {image} | {text} | {tuned} | {exports} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in reasons.items())])


def _train(file: Path, run_dir: Path, cache: Path, tuning: str) -> None:
    words = f"""
        run_dir={run_dir} device=cpu threads=1 model.name={file} model.pretrained= model.tuning={tuning} lora.rank=2
        data.train=scenes:n=8,size={SIZE} data.val_fraction=0 data.num_workers=0 data.cache_dir={cache}
        objective.k=2 objective.guard_k=2 optimizer.lr=1e-3 curriculum.enabled=false train.epochs=1 train.batch_size=8
        train.precision=fp32 log.tensorboard=false log.progress=false
    """
    train(load_config(None, words.split()))


@torch.no_grad()
def _embed(clip) -> torch.Tensor:
    image, text = clip(torch.ones(2, 3, *_size(clip)), clip.tokenizer(CAPTIONS))
    return torch.cat([image, text])


def _size(clip) -> tuple[int, int]:
    size = clip.preprocessing["size"]
    return (size, size) if isinstance(size, int) else tuple(size)


def _reason(file: Path, error: BaseException) -> str:
    """The message, which must name the architecture, without the name."""
    message = str(error).splitlines()[0]
    assert file.stem in message, f"a refusal that does not name {file.stem}: {message}"
    return message.replace(file.stem, "it")


def _image_encoder(config: dict) -> str:
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        family = vision["timm_model_name"].split("_")
        kinds = [part for part in family[1:] if part in ("mci", "siglip", "pe", "relpos", "gap")]
        return " ".join(["timm", family[0], *kinds])
    return "ResNet" if isinstance(vision.get("layers"), list) else "ViT"


def _text_encoder(config: dict, original: dict) -> str:
    if "hf_model_name" in original:
        return original["hf_model_name"]
    text = config["text_cfg"]
    traits = [name for name in ("embed_cls", "no_causal_mask", "proj_bias") if text.get(name)]
    traits += [f"{key} {text[key]}" for key in ("pool_type", "proj_type") if key in text]
    return " ".join(["transformer", *(f"({trait})" for trait in traits)])


def main(words: list[str]) -> int:
    """Tries those that `words` name, or all; with all, writes the table into the docs."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    formats = (*FORMATS, "onnx") if "--onnx" in words else FORMATS
    words = [word for word in words if word != "--onnx"]
    results = []
    with tempfile.TemporaryDirectory() as folder, small_timm():
        for result in survey(words or shipped(), Path(folder), formats):
            refused = {name: reason for name, reason in result.trials.items() if reason}
            print(", ".join(result.names), "|", refused or "all work", flush=True)
            results.append(result)
    if not words:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
