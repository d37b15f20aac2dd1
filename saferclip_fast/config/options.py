"""Every option of a training run: its type, default and meaning, in one place."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args, get_type_hints

from ..data.images import MAX_PIXELS
from ..errors import UserError
from ..objectives.defaults import (
    DEFAULT_BETA,
    DEFAULT_GUARD_K,
    DEFAULT_GUARD_MARGIN,
    DEFAULT_K,
    DEFAULT_MARGIN,
    DEFAULT_PAGE,
    DEFAULT_WEIGHTS,
)

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")  # what log.to may name


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
    dora: bool = option(False, "DoRA: the length of each row of a weight is trained apart from its direction")
    init: Literal["zero", "fisher"] = option(
        "zero", "adapters start at 0, or where the gradients of unsafe samples are large and of safe ones small"
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
    text_only: bool = option(False, "there are no unsafe images: train the text encoder alone (docs/data.md)")
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
    spread: float = option(DEFAULT_WEIGHTS["spread"], "safe texts, and images, of a batch crowd no closer (SAGE)", 0)
    neighbors: float = option(
        DEFAULT_WEIGHTS["neighbors"], "neighbors among a batch's safe texts, and images, stay as near (SAGE)", 0
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
    metric: Literal["loss", "recall", "recall_sum"] = option(
        "loss",
        "what the best validation has: the least loss, the most safe pairs that find each other first, or Safe-CLIP's "
        "sum of recalls, which counts redirected pairs too",
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
    to: list[str] = option([], "other places for the figures: wandb, mlflow, trackio (docs: Where figures go)")  # noqa: RUF009
    project: str = option("saferclip", "what these places call the project (MLflow: the experiment)")
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


def _written(value: Any) -> str:
    """A default as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
