"""The model card: what the model is, how it was made, how to load it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..checkpoint import CheckpointFolder
from ..config import flatten
from ..files import atomic_write
from .source import Source

_PRIVATE = ("run_dir", "data.cache_dir", "data.root", "data.unsafe_root")  # places on the trainer's machine

LOADING = {
    "open_clip": 'import open_clip\nmodel, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")',
    "huggingface": "from transformers import CLIPModel, CLIPProcessor, CLIPTextModel, CLIPVisionModel\n"
    'model = CLIPModel.from_pretrained("{folder}")\n'
    'processor = CLIPProcessor.from_pretrained("{folder}")\n'
    'text_encoder = CLIPTextModel.from_pretrained("{folder}/text_model")  # Stable Diffusion 1.x, if it is a ViT-L/14\n'
    'vision_tower = CLIPVisionModel.from_pretrained("{folder}/vision_model")  # LLaVA',
    "peft": "from peft import PeftModel\nfrom transformers import CLIPModel\n"
    'base = CLIPModel.from_pretrained("{base}")\n'
    'model = PeftModel.from_pretrained(base, "{folder}")',
    "onnx": "import onnxruntime\n"
    'session = onnxruntime.InferenceSession("{folder}/image_encoder.onnx")  # text_encoder.onnx takes "tokens"\n'
    '(embedding,) = session.run(["clip_embedding"], {{"images": images}})  # not normalized; see preprocessing.json',
}


def write_card(source: Source, formats: Sequence[str], folder: Path, in_subfolders: bool) -> None:
    """Writes FOLDER/README.md for `formats`, which lie in FOLDER/FORMAT or, one alone, in FOLDER itself."""
    with atomic_write(folder / "README.md") as file:
        file.write_text(card(source, formats, in_subfolders), "utf-8")


def card(source: Source, formats: Sequence[str], in_subfolders: bool) -> str:
    """The card as Markdown. No path of the machine that trained the model is in it."""
    lines = [
        "---",
        "tags: [clip, safety, saferclip_fast]",
        "---",
        f"# {source.clip.name}, {'made safer with' if source.run_dir else 'converted by'} saferclip_fast",
        "",
        f"Weights hash: `{source.clip.weights_hash}`. Safety dial: {source.alpha:g} (0 frozen, 1 as trained).",
        "",
        "## Loading",
        "",
    ]
    for name in formats:
        base = "the frozen model, e.g. written by --format huggingface --alpha 0"
        text = LOADING[name].format(folder=name if in_subfolders else "THIS_FOLDER", base=base)
        lines += [name, "", "```python", text, "```", ""]
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


def _training(source: Source) -> list[str]:
    if source.run_dir is None or source.config is None:
        return []
    lines = ["## Training", ""]
    hashes = _hashes(source.run_dir)
    lines += [f"- {name.replace('_', ' ')}: `{value}`" for name, value in hashes.items()]
    lines += ["", "```yaml"]
    for key, value in flatten(source.config).items():
        if key not in _PRIVATE:
            shown = Path(value).name if key in ("data.train", "data.val", "model.pretrained") and value else value
            lines.append(f"{key}: {json.dumps(shown)}")
    lines += ["```", ""]
    metrics = source.run_dir / "metrics.json"
    if metrics.is_file() and source.alpha == 1:
        values = json.loads(metrics.read_text(encoding="utf-8"))
        lines += ["## Metrics", "", "| | frozen | fine-tuned |", "|---|---|---|"]
        lines += [
            f"| {name.replace('_', ' ')} | {before:.3f} | {values['fine_tuned'][name]:.3f} |"
            for name, before in values["frozen"].items()
        ]
    return lines


def _hashes(run_dir: Path) -> dict[str, Any]:
    """Hashes of the data and of the frozen weights, from the newest checkpoint."""
    paths = CheckpointFolder(run_dir / "checkpoints", keep=1).paths()
    if not paths:
        return {}
    with safe_open(paths[-1], framework="pt", device="cpu") as file:
        state = json.loads((file.metadata() or {}).get("state", "{}"))
    return {name: state[name] for name in ("data_hash", "weights_hash") if name in state}
