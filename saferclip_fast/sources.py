"""Models that a path or a name stands for: a run's folder, open_clip weights, a Hugging Face folder, a tag."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .config import Config
from .models import CONFIG_NAME, WEIGHTS_NAME, ClipModel, load_clip
from .models.dial import mix
from .models.huggingface import Unsupported
from .models.places import check_there
from .results import GATE_FILE
from .train.checkpoint import CheckpointError, CheckpointFolder, read_checkpoint
from .train.frozen import load_frozen, read_final
from .train.run_folder import read_run_config

# The hub's models that compute what open_clip's do with the tag "openai". Without "-quickgelu" in its name, open_clip
# loads the same weights with another activation: that model is not on the hub.
OPENAI_ON_THE_HUB = {
    "ViT-B-32-quickgelu": "openai/clip-vit-base-patch32",
    "ViT-B-16-quickgelu": "openai/clip-vit-base-patch16",
    "ViT-L-14-quickgelu": "openai/clip-vit-large-patch14",
    "ViT-L-14-336-quickgelu": "openai/clip-vit-large-patch14-336",
}
_SAME_WEIGHT = 1e-5  # merging on another device rounds differently; a training step at lr 1e-5 moves weights further


@dataclass
class Source:
    """A model, and what is known of where it came from."""

    clip: ClipModel  # as it will be exported: adapters merged, dial applied
    path: Path
    run_dir: Path | None = None  # where the model is a run's
    config: Config | None = None  # that run's
    alpha: float = 1.0

    @property
    def base_on_the_hub(self) -> str | None:
        """The Hugging Face hub's CLIPModel with the weights that the run started from, where there is one."""
        if self.config is None or self.config.model.pretrained != "openai":
            return None
        return OPENAI_ON_THE_HUB.get(self.config.model.name)

    @property
    def has_adapters(self) -> bool:
        """Whether it is a run that trained adapters."""
        return self.config is not None and self.config.model.tuning == "lora"

    def frozen(self) -> ClipModel:
        """The pre-trained model that the run started from.

        Raises FrozenModelError where it is not what it was.
        """
        assert self.run_dir is not None and self.config is not None, "only a run has frozen weights"
        return load_frozen(self.run_dir, self.config)

    def adapted(self) -> ClipModel:
        """The pre-trained model with the adapters that final/ was merged from, whatever the dial.

        Raises Unsupported for a model without adapters and ValueError where they are lost, both with the remedy.
        """
        if self.run_dir is None or self.config is None:
            raise Unsupported(
                f"{self.path} holds merged weights only, and a PEFT adapter needs the adapters: give the run's folder "
                "(it has config.yaml, checkpoints/ and best.safetensors), or export with --format huggingface"
            )
        if self.config.model.tuning != "lora":
            raise Unsupported(
                f"{self.path} trained every weight (model.tuning=full), so it has no adapters; "
                "export with --format huggingface, or train with model.tuning=lora"
            )
        options, start = self.config.lora, self.config.lora.init == "fisher"
        clip = self.frozen().add_lora(options.rank, options.alpha, 0.0, options.targets, options.dora, start)
        final = load_file(self.run_dir / "final" / WEIGHTS_NAME)
        own = clip.model.state_dict()
        for tensors in _trained(self.run_dir):
            adapters = {name for name in own if ".lora_" in name}
            if self.config.data.text_only:  # the image encoder's add nothing, and were never trained
                adapters = {name for name in adapters if not name.startswith("visual.")}
            if set(tensors) != adapters:
                continue
            _copy(own, tensors)
            merged = clip.exported_state_dict()
            if all(torch.allclose(merged[name], final[name], rtol=0, atol=_SAME_WEIGHT) for name in final):
                return clip
        raise ValueError(
            f"{self.path}: neither best.safetensors nor a checkpoint that can be read holds the adapters that final/ "
            "was merged from; repeat the training's last command with resume=auto"
        )


def is_run(model: str) -> bool:
    """Whether `model` is the folder of a training run."""
    return (Path(model) / "config.yaml").is_file()


def open_model(model: str, device: torch.device) -> ClipModel:
    """A run's final weights, an open_clip or Hugging Face folder, "NAME,PRETRAINED" or what else load_clip takes.

    Raises FileNotFoundError, ValueError, OSError or ImportError with the remedy.
    """
    if Path(model).is_dir():
        return load_source(model).clip.to(device)
    name, _, pretrained = model.partition(",")
    try:
        return load_clip(name, pretrained, device)
    except ValueError as error:
        hint = f"there is no folder {model}, and " if str(error).startswith("unknown model") else ""
        raise ValueError(f"{hint}{error}") from error


def frozen_of(model: str, device: torch.device) -> ClipModel:
    """The model that the run `model` started from."""
    folder = Path(model)
    return load_frozen(folder, read_run_config(folder), device)


def load(run: str | os.PathLike, dial: float = 1.0, device: str | torch.device = "cpu") -> ClipModel:
    """The tuned model of a finished run, ready to use: `encode_image`, `encode_text`, `preprocess`, `tokenizer`.

    Args:
        run: the run's folder, or what `fine_tune` returned; with dial=1 also an open_clip or a Hugging Face folder.
        dial: the safety dial: weights W0 + dial (W1 - W0), W0 frozen, W1 fine-tuned. 0 is the frozen model, 1 the run
            as trained, and above 1 goes further the same way.
        device: where the model goes.

    Returns:
        A ClipModel in evaluation mode, adapters merged. Images [B, 3, H, W] and tokens [N, L] give embeddings [B or N,
        d] float32, not normalized.

    Raises:
        FileNotFoundError: nothing there, or a run that has not come to its end.
        ValueError: no model, or a dial that is negative or has no frozen weights.
        FrozenModelError: the run's frozen model is not the one that it was tuned from.
    """
    return load_source(Path(run), alpha=dial).clip.to(device).eval()


def load_source(path: str | Path, model: str = "", alpha: float = 1.0) -> Source:
    """Read the model to export.

    Args:
        path: a run's folder, an open_clip folder or weights file, or a folder with a Hugging Face CLIPModel.
        model: the open_clip name of a weights file's model.
        alpha: the safety dial: weights W0 + alpha (W1 - W0), W0 frozen, W1 fine-tuned. Other than 1 for runs only.

    Raises:
        ValueError: not a model, no model name, a dial without frozen weights, an architecture open_clip lacks.
        Unsupported: a gate, which is two models.
        FileNotFoundError: nothing at `path`, or a run that has not come to its end.
        FrozenModelError: a run with another run's final/; with a dial, another frozen model than the run's.
    """
    path = Path(path)
    check_there(path)
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha={alpha}: the safety dial goes from 0 (frozen) over 1 (as trained) to 1.5 or so")
    if (path / "config.yaml").is_file():
        return _from_run(path, alpha)
    if (path / GATE_FILE).is_file():
        raise Unsupported(
            f"{path} is a gate: it embeds each input by one of two models, which no one set of weights does; load it "
            f"with sf.load_gate, measure it with saferclip gate, or take {path / 'tuned'}, the tuned model alone"
        )
    if alpha != 1:
        raise ValueError(
            f"alpha={alpha} needs the frozen weights too, which only a run's folder leads to; {path} is none"
        )
    if path.is_file():
        if not model:
            raise ValueError(f"{path} is a weights file: say of which model, e.g. --model ViT-L-14-quickgelu")
        return Source(_named(load_clip(model, str(path)), model), path)
    if not (path / CONFIG_NAME).is_file() and not (path / "config.json").is_file():
        raise ValueError(
            f"{path} is no run (config.yaml), no open_clip folder ({CONFIG_NAME}) and no Hugging Face folder "
            "(config.json)"
        )
    return Source(_named(load_clip(f"local-dir:{path}"), path.resolve().name), path)


def _from_run(path: Path, alpha: float) -> Source:
    config = read_run_config(path)
    if not (path / "final" / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"{path} has no final/{WEIGHTS_NAME} yet: finish the run with resume=auto")
    read_final(path, config)
    try:
        clip = load_clip(f"local-dir:{path / 'final'}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{CONFIG_NAME} or {WEIGHTS_NAME} in {path / 'final'} is damaged ({error}): repeat the training's last "
            "command with resume=auto, which writes them again"
        ) from error
    source = Source(clip, path, path, config, alpha)
    if alpha != 1:
        source.clip = mix(source.frozen(), source.clip, alpha)
    _named(source.clip, config.model.name)
    return source


def without_folders(value: str) -> str:
    """A path's last part; a model's name, a tag and a source of data that is no path stay as they are."""
    return value if value.startswith("hf-hub:") else Path(value).name


def _named(clip: ClipModel, name: str) -> ClipModel:
    clip.name = without_folders(name).removesuffix(".json")
    return clip


def _trained(run_dir: Path) -> Iterator[dict[str, Tensor]]:
    """The trained tensors by their names in the open_clip model: the best ones, then each checkpoint's, newest first.

    A run with train.ema exports the average, which a checkpoint holds beside the weights ("ema.", docs/training.md).
    """
    best = [run_dir / "best.safetensors"] if (run_dir / "best.safetensors").is_file() else []
    for file in [*best, *reversed(CheckpointFolder(run_dir / "checkpoints", keep=1).paths())]:
        try:
            tensors = read_checkpoint(file).tensors
        except CheckpointError as error:
            warnings.warn(f"{error}; looking further", stacklevel=2)
            continue
        trained = {name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")}
        averaged = {name.removeprefix("ema."): x for name, x in tensors.items() if name.startswith("ema.")}
        if averaged:
            yield {name: averaged.get(name, x) for name, x in trained.items()}  # only the adapters' start is not
        yield trained


@torch.no_grad()
def _copy(own: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        own[name].copy_(value)
