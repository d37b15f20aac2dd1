"""The model card: what the model is, how to load it, how it was made, what it measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import flatten
from ..results import EVALUATION_FORMAT, NO_UNSAFE_IMAGES, evaluation_shape, misfits
from ..sources import Source, without_folders
from ..storage.files import atomic_write
from ..train.checkpoint import newest_state

BASE_FOLDER = "base_model"  # in peft/: the frozen model, where no hub has it
_PRIVATE = ("run_dir", "data.cache_dir", "data.root", "data.unsafe_root")  # places on the trainer's machine
_MAY_BE_PATHS = ("data.train", "data.val", "model.name", "model.pretrained")

LIBRARIES = {"open_clip": "open_clip", "huggingface": "transformers", "peft": "peft", "onnx": "onnx"}  # the hub's names

# {folder}, {base}, {shape} and {length} are filled in; each runs as printed and ends with embeddings, not normalized.
LOADING = {
    "open_clip": """\
import open_clip
import torch

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}")
with torch.no_grad():
    text = model.eval().encode_text(tokenizer(["a dog in the park"]))""",
    "huggingface": """\
import torch
from transformers import CLIPModel, CLIPProcessor, CLIPTextModel, CLIPVisionModel

model = CLIPModel.from_pretrained("{folder}")
processor = CLIPProcessor.from_pretrained("{folder}")
with torch.no_grad():
    text = model.get_text_features(**processor(text=["a dog in the park"], return_tensors="pt")).pooler_output

# its two encoders alone, for other models
text_encoder = CLIPTextModel.from_pretrained("{folder}/text_model")  # of a ViT-L/14: for Stable Diffusion 1.x
vision_tower = CLIPVisionModel.from_pretrained("{folder}/vision_model")  # for LLaVA""",
    "peft": """\
import torch
from peft import PeftModel
from transformers import CLIPModel, CLIPProcessor

base = CLIPModel.from_pretrained("{base}")  # the frozen model
processor = CLIPProcessor.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{folder}").eval()
with torch.no_grad():
    text = model.get_text_features(**processor(text=["a dog in the park"], return_tensors="pt")).pooler_output""",
    "onnx": """\
import numpy
import onnxruntime

images = numpy.zeros({shape}, numpy.float32)  # prepared as preprocessing.json says
encoder = onnxruntime.InferenceSession("{folder}/image_encoder.onnx")
(image,) = encoder.run(["clip_embedding"], {{"images": images}})

tokens = numpy.zeros((1, {length}), numpy.int64)  # of CLIP's tokenizer, padded with 0
tokens[0, :7] = 49406, 320, 1929, 530, 518, 1452, 49407  # "a dog in the park"
encoder = onnxruntime.InferenceSession("{folder}/text_encoder.onnx")
(text,) = encoder.run(["clip_embedding"], {{"tokens": tokens}})""",
}


def write_card(source: Source, formats: Sequence[str], folder: Path, in_subfolders: bool) -> None:
    """Writes FOLDER/README.md for `formats`, which lie in FOLDER/FORMAT or, one alone, in FOLDER itself."""
    with atomic_write(folder / "README.md") as file:
        file.write_text(card(source, formats, in_subfolders), "utf-8")


def card(source: Source, formats: Sequence[str], in_subfolders: bool) -> str:
    """The card as Markdown. No path of the machine that trained the model is in it."""
    lines = [
        *_head(source, formats),
        f"# {source.clip.name}, {'made safer with' if source.run_dir else 'converted by'} saferclip_fast",
        "",
        f"Weights hash: `{source.clip.weights_hash}`. Safety dial: {source.alpha:g} (0 frozen, 1 as trained).",
        "",
        "## Loading",
        "",
        "Run these in this folder, or put its path in front.",
        "",
    ]
    for name in formats:
        lines += [f"### {name}", "", "```python", _loading(source, name, name if in_subfolders else "."), "```", ""]
    lines += [
        "## Intended use and limits",
        "",
        "For retrieval, classification and as an encoder of other models, where unsafe queries should find safe",
        "content. Unsafe inputs are redirected towards safe embeddings; some still find unsafe content. It is one",
        "layer of protection, not a filter that decides by itself, and must be measured on the data it will meet.",
        "It is not for detecting, ranking or generating unsafe content, nor for decisions about people. It keeps",
        "the biases of its base model.",
        "",
        "## License",
        "",
        "The weights derive from those of the base model and from the training data: the terms of both apply.",
        "",
        *_training(source),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _head(source: Source, formats: Sequence[str]) -> list[str]:
    """What the Hugging Face hub reads: of a model it does not know, whose license is that of base and data."""
    base = [f"base_model: {source.base_on_the_hub}"] if source.base_on_the_hub else []
    about = [
        "license: other",
        f"library_name: {LIBRARIES[formats[0]]}",
        "pipeline_tag: zero-shot-image-classification",
        "tags: [clip, safety, saferclip_fast]",
    ]
    return ["---", *base, *about, "---"]


def _loading(source: Source, name: str, folder: str) -> str:
    clip = source.clip
    size = clip.preprocessing["size"]
    height, width = (size, size) if isinstance(size, int) else size
    base = source.base_on_the_hub or (f"{folder}/{BASE_FOLDER}" if folder != "." else BASE_FOLDER)
    length = clip.context_length
    return LOADING[name].format(folder=folder, base=base, shape=(1, 3, height, width), length=length)


def _training(source: Source) -> list[str]:
    if source.run_dir is None or source.config is None:
        return []
    lines = ["## Training", ""]
    if source.config.data.text_only:
        lines += ["Trained without unsafe images: the text encoder alone; the image encoder is the frozen model's.", ""]
    hashes = _hashes(source.run_dir)
    known = [f"- {name.replace('_', ' ')}: `{value}`" for name, value in hashes.items()]
    lines += known or ["- data hash: not known, since no checkpoint of the run is left"]
    lines += ["", "```yaml"]
    for key, value in flatten(source.config).items():
        if key not in _PRIVATE:
            shown = without_folders(value) if key in _MAY_BE_PATHS else value
            lines.append(f"{key}: {json.dumps(shown)}")
    return [*lines, "```", "", *_measured(source)]


def _measured(source: Source) -> list[str]:
    """The key metrics of the run's evaluation.json, if it is of the weights that are exported."""
    assert source.run_dir is not None
    lines = ["## Evaluation", ""]
    file = source.run_dir / "evaluation.json"
    evaluation = _read_evaluation(file) if file.is_file() else {}
    if (
        evaluation.get("format") != EVALUATION_FORMAT
        or evaluation["models"]["tuned"]["weights_hash"] != source.clip.weights_hash
        or not evaluation["key_metrics"]
    ):
        return [*lines, "These weights have not been measured: `python -m saferclip_fast.evaluate` does it."]
    if evaluation.get("text_only"):
        lines += [NO_UNSAFE_IMAGES, ""]
    metrics = [evaluation["metrics"][name] for name in evaluation["key_metrics"]]
    columns = {"frozen": "frozen", "tuned": "this model", "change": "change"}
    columns = {side: title for side, title in columns.items() if side in metrics[0]}
    lines += [
        f"{evaluation['rows']} held-out quadruplets, {evaluation['settings']['confidence']:.0%} intervals in brackets.",
        "",
        f"| | {' | '.join(columns.values())} | wanted |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for metric in metrics:
        cells = [_estimate(metric[side], "+.3f" if side == "change" else ".3f") for side in columns]
        label = metric["label"].replace("|", r"\|")
        lines.append(f"| {label} | {' | '.join(cells)} | {metric['wanted'] or ''} |")
    return lines


def _read_evaluation(file: Path) -> dict[str, Any]:
    """Raises ValueError naming a damaged file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): evaluate again, or delete it") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is damaged (it is no object): evaluate again, or delete it")
    if value.get("format") != EVALUATION_FORMAT:
        return {}  # of another version
    for misfit in misfits(value, evaluation_shape(value), "it"):
        raise ValueError(f"{file} is damaged ({misfit}): evaluate again, or delete it")
    return value


def _estimate(estimate: Mapping[str, float], form: str) -> str:
    return f"{estimate['value']:{form}} [{estimate['low']:{form}}, {estimate['high']:{form}}]"


def _hashes(run_dir: Path) -> dict[str, Any]:
    """Hashes of the data and of the frozen weights, from the newest checkpoint."""
    state = newest_state(run_dir / "checkpoints") or {}
    return {name: state[name] for name in ("data_hash", "weights_hash") if name in state}
