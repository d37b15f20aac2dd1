"""Every option of a training run: its type, default and meaning, in one place.

Options come from the defaults below, the recipe that a choice brings, a YAML file and `key=value` words, in this order;
each is checked when read.
"""

import difflib
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .data.images import MAX_PIXELS
from .errors import UserError
from .objectives.defaults import (
    DEFAULT_BETA,
    DEFAULT_GUARD_K,
    DEFAULT_GUARD_MARGIN,
    DEFAULT_K,
    DEFAULT_MARGIN,
    DEFAULT_PAGE,
    DEFAULT_WEIGHTS,
)
from .recipes import RECIPES

Given = Sequence[str] | Mapping[str, Any]  # options: "key=value" words, or values by their keys, dotted or nested
CONFIG_FOLDER = Path(__file__).parent / "configs"


class ConfigError(UserError, ValueError):
    """An option that does not exist, or a value it cannot take."""


def option(default: Any, meaning: str, low: float | None = None, high: float | None = None) -> Any:
    """A config field: its default, what it means, and the closed range it must lie in."""
    metadata = {"meaning": meaning, "low": low, "high": high}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelOptions:
    name: str = option("ViT-L-14-quickgelu", "open_clip model name, architecture JSON, local-dir: or hf-hub: source")
    pretrained: str = option("openai", "open_clip tag or weights file; empty for local-dir: and hf-hub: sources")
    weights_hash: str = option(
        "", "SHA-256 that the frozen weights must have, as in a run's config.yaml; empty: any, and filled in there"
    )
    tuning: Literal["lora", "full"] = option("lora", "train LoRA adapters on both encoders, or every weight")


@dataclass
class LoraOptions:
    rank: int = option(16, "inner width of the adapters", 1)
    alpha: float = option(16.0, "adapters are scaled by alpha / rank", 0)
    dropout: float = option(0.0, "dropout on the adapters' input", 0, 1)
    targets: list[str] = option(  # noqa: RUF009 - it is a dataclasses.field
        ["all"], "endings of layer names (in_proj, out_proj, c_fc, c_proj), or all"
    )


@dataclass
class DataOptions:
    train: str = option(
        "", "training quadruplets: CSV, JSONL, Parquet, ViSU JSON, shards, a folder of `datasets` (docs/data.md)"
    )
    root: str = option("", "folder of a table's images, COCO's for ViSU, NoCaps' for NSFWCaps; empty: the table's own")
    unsafe_root: str = option("", "folder of unsafe images of ViSU and NSFWCaps; empty: the JSON file's own")
    unsafe_image: str = option("", "unsafe image's name where an entry has none, e.g. {id}.png")
    columns: list[str] = option([], "a table's column names as field=column, e.g. [safe_text=caption]")  # noqa: RUF009
    allow_absolute: bool = option(False, "admit absolute image paths, which may lie outside root")
    max_pixels: int = option(MAX_PIXELS, "refuse larger images", 1)
    val: str = option("", "validation quadruplets; empty: hold out val_fraction of the training ones")
    val_fraction: float = option(0.02, "held-out share when val is empty; 0: no validation", 0, 0.9)
    on_error: Literal["skip", "raise"] = option("skip", "bad rows: skip and count them, or stop at the first")
    num_workers: int = option(4, "loader processes; the result does not depend on it", 0)
    cache_dir: str = option(".cache/saferclip", "where frozen embeddings and neighbors are kept, by content")
    decoded_cache: bool = option(False, "also keep the resized images there, so that no epoch decodes (docs/data.md)")


@dataclass
class WeightOptions:
    uni_text: float = option(DEFAULT_WEIGHTS["uni_text"], "unsafe text towards its safe neighbor's text", 0)
    uni_image: float = option(DEFAULT_WEIGHTS["uni_image"], "unsafe image towards its safe neighbor's image", 0)
    cross_text: float = option(DEFAULT_WEIGHTS["cross_text"], "unsafe text: safe image above unsafe image", 0)
    cross_image: float = option(DEFAULT_WEIGHTS["cross_image"], "unsafe image: safe text above unsafe text", 0)
    cos_text: float = option(DEFAULT_WEIGHTS["cos_text"], "safe text stays where it was", 0)
    cos_image: float = option(DEFAULT_WEIGHTS["cos_image"], "safe image stays where it was", 0)
    nce_text: float = option(DEFAULT_WEIGHTS["nce_text"], "safe text still finds its image (InfoNCE)", 0)
    nce_image: float = option(DEFAULT_WEIGHTS["nce_image"], "safe image still finds its text (InfoNCE)", 0)
    rank_guard: float = option(
        DEFAULT_WEIGHTS["rank_guard"], "no redirected item among a safe query's first results; 0 is the paper", 0
    )


@dataclass
class ObjectiveOptions:
    name: Literal["saferclip", "safeclip", "shieldclip"] = option(
        "saferclip", "SafeR-CLIP, or a baseline: Safe-CLIP, ShieldCLIP, with their authors' weights and no curriculum"
    )
    preset: Literal["default", "paper"] = option(
        "default", "paper: SafeR-CLIP's own setting in place of the defaults below; options that are given win over it"
    )
    targets: Literal["pair", "nearest"] = option(
        "pair", "safeclip: redirect to the sample's own safe pair (its paper), or to the nearest one (ablation)"
    )
    neighbors: Literal["offline", "in_step"] = option(
        "offline", "find safe targets once before training, or in every step against the resident bank"
    )
    bank: Literal["resident", "sharded", "mapped"] = option(
        "resident", "safe rows: whole on each device, a slice on each rank, or in a file that is read as needed"
    )
    k: int = option(DEFAULT_K, "safe neighbors per unsafe sample; 1 is the paper", 1, 256)
    tau: float = option(0.05, "temperature of the neighbors' weights, for k > 1", 1e-6)
    beta: float = option(DEFAULT_BETA, "sharpness of the cross terms' softplus; 1 is the paper", 1e-6)
    margin: float = option(DEFAULT_MARGIN, "margin of the cross terms; 0 is the paper")
    negative: Literal["current", "frozen"] = option(
        "current", "the unsafe counterpart as it is now, without gradient, or frozen (the paper)"
    )
    page: float = option(
        DEFAULT_PAGE, "results that the rank guard keeps clear, as a share of a gallery: 0.03 is 30 of 1,000", 1e-6, 1
    )
    guard_k: int = option(DEFAULT_GUARD_K, "safe queries that the rank guard counts for each sample", 1, 256)
    guard_margin: float = option(DEFAULT_GUARD_MARGIN, "margin of the rank guard's hinge", 0)
    logit_scale: float = option(100.0, "inverse temperature of the InfoNCE terms", 0)
    backend: Literal["auto", "reference", "cpu", "cuda", "triton"] = option("auto", "which kernels run the losses")
    weights: WeightOptions = field(default_factory=WeightOptions)


@dataclass
class CurriculumOptions:
    enabled: bool = option(True, "three stages by similarity to the safe target: easy, easy + medium, all")


@dataclass
class OptimizerOptions:
    name: Literal["adam", "adamw"] = option("adam", "Adam, or AdamW with decoupled weight decay")
    lr: float = option(1e-4, "peak learning rate", 0)
    beta1: float = option(0.9, "decay of the gradient average", 0, 1)
    beta2: float = option(0.999, "decay of the squared-gradient average", 0, 1)
    eps: float = option(1e-8, "added to the denominator", 0)
    weight_decay: float = option(0.0, "weight decay, on matrices only", 0)
    schedule: Literal["constant", "cosine"] = option("constant", "learning rate after the warm-up")
    warmup_steps: int = option(0, "linear warm-up from 0", 0)
    clip_norm: float = option(1.0, "largest global gradient norm; 0: no clipping", 0)


@dataclass
class TrainOptions:
    epochs: int = option(9, "passes over the training set", 1)
    batch_size: int = option(48, "quadruplets per step, over all ranks", 1)
    micro_batch_size: int = option(0, "quadruplets in memory at a time, same gradient (docs: Large batches); 0: all", 0)
    compile: bool = option(False, "run the encoders through torch.compile (docs: Where a step's time goes)")
    profile: int = option(0, "steps to record with torch.profiler into RUN_DIR/profile; 0: none", 0)
    fsdp: bool = option(
        False, "full tuning: weights, gradients and moments in slices, one on each rank (docs/scale.md)"
    )
    timeout_minutes: float = option(10.0, "a rank that hangs so long in training is given up", 0.01)
    checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, same gradient")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "autocast type; auto: bf16 where the hardware has it, else fp32; fp16 scales the loss"
    )
    tf32: bool = option(True, "TF32 matrix products for what stays in fp32 (GPU)")
    deterministic: bool = option(True, "deterministic GPU kernels, so that a resumed run repeats bit for bit")
    ema: float = option(
        0.0, "decay of an average of the weights, validated and exported, e.g. 0.999; 0: none", 0, 0.999999
    )
    on_nan: Literal["stop", "skip"] = option(
        "stop", "a gradient that is not finite: stop the run, or leave the step out; the batch is named either way"
    )
    embed_batch_size: int = option(256, "batch of the one pass through the frozen encoders", 1)


@dataclass
class ValidationOptions:
    every_epochs: int = option(1, "epochs between validations", 1)
    metric: Literal["loss", "recall"] = option(
        "loss", "what the best validation has: the least loss, or the most safe pairs that find each other first"
    )
    patience: int = option(0, "validations without a new best before stopping; 0: never stop early", 0)
    final: Literal["best", "last"] = option("best", "weights to export: of the best validation, or of the last step")


@dataclass
class CheckpointOptions:
    every_steps: int = option(500, "steps between checkpoints; one is also written after each epoch", 1)
    keep: int = option(2, "newest checkpoints to keep", 1)


@dataclass
class LogOptions:
    every_steps: int = option(10, "steps between log lines", 1)
    tensorboard: bool = option(True, "write TensorBoard events to RUN_DIR/tensorboard")
    progress: bool = option(True, "show progress bars")


@dataclass
class Config:
    """Every option of a training run; docs/training.md has them in a table."""

    run_dir: str = option("runs/train", "folder for the log, checkpoints, resolved config and final weights")
    resume: Literal["never", "auto"] = option("never", "never: refuse a used run_dir; auto: go on if it can")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    threads: int = option(0, "CPU threads; 0: torch decides", 0)
    seed: int = option(0, "seed of adapters, order and dropout", 0)
    model: ModelOptions = field(default_factory=ModelOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    data: DataOptions = field(default_factory=DataOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    curriculum: CurriculumOptions = field(default_factory=CurriculumOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    log: LogOptions = field(default_factory=LogOptions)


@dataclass(frozen=True)
class Option:
    """One line of the option table."""

    key: str
    kind: str
    default: Any
    meaning: str
    low: float | None
    high: float | None


def options(group: type = Config, prefix: str = "") -> Iterator[Option]:
    """Every option in order, nested ones as "group.name"."""
    hints = get_type_hints(group)
    for item in fields(group):
        if is_dataclass(hints[item.name]):
            yield from options(hints[item.name], f"{prefix}{item.name}.")
            continue
        default = item.default_factory() if callable(item.default_factory) else item.default
        choices = get_args(hints[item.name]) if hints[item.name].__class__.__name__ == "_LiteralGenericAlias" else ()
        kind = " | ".join(choices) or getattr(hints[item.name], "__name__", "list")
        kind = "list" if isinstance(default, list) else kind
        yield Option(f"{prefix}{item.name}", kind, default, **item.metadata)


def option_table() -> str:
    """All options as a Markdown table (docs/training.md holds it; --help prints it)."""
    lines = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for o in options():
        kind = o.kind.replace(" | ", ", ")
        lines.append(f"| `{o.key}` | {kind} | `{_written(o.default)}` | {o.meaning} |")
    return "\n".join(lines)


def option_help() -> str:
    """All options as plain text for --help."""
    return "\n".join(f"  {o.key}={_written(o.default)}  ({o.kind})\n        {o.meaning}" for o in options())


def load_config(path: str | Path | None = None, overrides: Given = (), source: str = "command line") -> Config:
    """Defaults, then what objective.preset and objective.name bring (RECIPES), the YAML file, the `overrides`.

    Args:
        path: a YAML file, or the name of a shipped one ("paper"); None for the defaults alone.
        overrides: words such as "optimizer.lr=3e-4" or "lora.targets=[in_proj,out_proj]", or values by their keys;
            `source` says in messages where they are from.

    Raises:
        ConfigError: unknown key (with the nearest one), wrong type, value out of range, unreadable file.
    """
    merged, layers = OmegaConf.structured(Config), []
    if path is not None:
        file, values = _read_yaml(path)
        layers.append((OmegaConf.create(values), [k for k, _ in _leaves(values)], file))
    kinds = {o.key: o.kind for o in options()}
    words, keys = OmegaConf.create(), list[str]()
    for key, value in pairs(overrides):
        _check_key(key, kinds, source)
        # text as typed: empty words stay, and nothing that YAML would read as something else changes
        typed = kinds[key] == "str" or not isinstance(value, str)
        OmegaConf.update(words, key, value if typed else OmegaConf.from_dotlist([f"x={value}"]).x)
        keys.append(key)
    layers.append((words, keys, source))
    given = merged
    for layer in layers:
        given = _merge(given, *layer)
    for (key, chosen), brought in RECIPES.items():
        if OmegaConf.select(given, key) == chosen:
            for other, value in brought.items():
                OmegaConf.update(merged, other, value)
    for layer in layers:
        merged = _merge(merged, *layer)
    config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    _check_ranges(config)
    return config


def pairs(given: Given) -> Iterator[tuple[str, Any]]:
    """(key, value) of each option, in order. Raises ConfigError for a word without "=" and a value of another kind."""
    if isinstance(given, Mapping):
        for key, value in _leaves(given):
            if isinstance(value, os.PathLike | tuple):
                value = os.fspath(value) if isinstance(value, os.PathLike) else list(value)
            if not isinstance(value, str | int | float | list):
                raise ConfigError(f"{key}={value!r:.60}: an option is text, a number, true or false, or a list")
            yield key, value
        return
    for word in given:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} is not key=value{_nearest(key)}")
        yield key, value


def flatten(config: Config) -> dict[str, Any]:
    """The config as {"group.name": value}."""
    return dict(_leaves(asdict(config)))


def _read_yaml(path: str | Path) -> tuple[str, dict[str, Any]]:
    file = Path(path)
    if not file.is_file() and file.suffix == "" and (CONFIG_FOLDER / f"{path}.yaml").is_file():
        file = CONFIG_FOLDER / f"{path}.yaml"
    if not file.is_file():
        shipped = ", ".join(sorted(f.stem for f in CONFIG_FOLDER.glob("*.yaml")))
        raise ConfigError(f"config file {path} not found; shipped configs: {shipped}")
    try:
        # OmegaConf's loader reads 1e-4 as a number, plain YAML as text
        values = OmegaConf.to_container(OmegaConf.load(file))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    except OSError as error:  # also OmegaConf's for a file that is one number
        raise ConfigError(f"{file}: cannot be read, or holds no `key: value` lines: {error}") from error
    if not values:
        raise ConfigError(f"{file}: is empty, no `key: value` line in it")
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected `key: value` lines, found a {type(values).__name__}")
    return str(file), {str(key): value for key, value in values.items()}


def _merge(merged: Any, values: Any, keys: Sequence[str], source: str) -> Any:
    kinds = {o.key: o.kind for o in options()}
    for key in keys:
        _check_key(key, kinds, source)
    try:
        return OmegaConf.merge(merged, values)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{source}: {key} takes {_article(kinds.get(key, 'value'))}: {reason}") from error


def _check_key(key: str, known: Collection[str], source: str) -> None:
    if key not in known:
        raise ConfigError(f"{source}: unknown option {key!r}{_nearest(key)}")


def _check_ranges(config: Config) -> None:
    values = flatten(config)
    for o in options():
        value, low, high = values[o.key], o.low, o.high
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{o.key}={value}: must be a finite number")
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ConfigError(f"{o.key}={value}: must be {bounds} ({o.meaning})")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _nearest(key: str) -> str:
    known = [o.key for o in options()]
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    if not near:  # the right name in the wrong group
        near = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
    return f", did you mean {near[0]!r}?" if near else "; --help lists all options"


def _written(value: Any) -> str:
    """A default as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _article(kind: str) -> str:
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list"}
    return names.get(kind, "one of " + kind)
