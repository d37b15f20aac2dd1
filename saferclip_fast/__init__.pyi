import types
import typing

import saferclip_fast.describe.result as _describe
import saferclip_fast.evaluate.result as _evaluate
import saferclip_fast.export.result as _export
import saferclip_fast.gate.model as _gate
import saferclip_fast.generate.result as _generate
import saferclip_fast.patch.result as _patch
import saferclip_fast.restore.result as _restore

from .api import FineTuned, fine_tune
from .bank import SafeBank
from .gate import GatedModel, load_gate
from .guard import Guard, fit_guard, load_guard
from .models import ClipModel, load_clip
from .ops import (
    Backend,
    BackendError,
    Neighbors,
    PreservationOutput,
    RetargetOutput,
    backends,
    info_nce,
    nearest_safe,
    preservation_loss,
    retarget_loss,
    use_backend,
)
from .sources import load
from .version import __version__

if not typing.TYPE_CHECKING:
    from . import describe, evaluate, export, gate, generate, patch, restore

# modules that can be called; describe_images, evaluate_model, export_model, gate_model, generate_images, patch_model
# and restore_model have the whole signatures
class _Describe(types.ModuleType):
    def __call__(
        self, model: typing.Any, run: typing.Any, images: typing.Any, out: typing.Any, **options: typing.Any
    ) -> _describe.Described: ...
    def __getattr__(self, name: str) -> typing.Any: ...

class _Evaluate(types.ModuleType):
    def __call__(self, model: typing.Any, data: typing.Any = None, **options: typing.Any) -> _evaluate.Evaluation: ...
    def __getattr__(self, name: str) -> typing.Any: ...

class _Export(types.ModuleType):
    def __call__(
        self, model: typing.Any, out: typing.Any, formats: str | typing.Sequence[str] = ..., **options: typing.Any
    ) -> dict[str, _export.Exported]: ...
    def __getattr__(self, name: str) -> typing.Any: ...

class _Gate(types.ModuleType):
    def __call__(
        self,
        tuned: typing.Any,
        guard: Guard | None = None,
        threshold: float | None = None,
        device: typing.Any = None,
    ) -> _gate.GatedModel: ...
    def __getattr__(self, name: str) -> typing.Any: ...

class _Generate(types.ModuleType):
    def __call__(
        self, pipeline: typing.Any, run: typing.Any, prompts: typing.Any, out: typing.Any, **options: typing.Any
    ) -> _generate.Generated: ...
    def __getattr__(self, name: str) -> typing.Any: ...

class _Patch(types.ModuleType):
    def __call__(
        self, run: typing.Any, pairs: typing.Any, out: typing.Any, **options: typing.Any
    ) -> _patch.Patched: ...
    def __getattr__(self, name: str) -> typing.Any: ...

class _Restore(types.ModuleType):
    def __call__(
        self, run: typing.Any, later: typing.Any, out: typing.Any, data: typing.Any = None, **options: typing.Any
    ) -> _restore.Restored: ...
    def __getattr__(self, name: str) -> typing.Any: ...

describe: _Describe
evaluate: _Evaluate
export: _Export
gate: _Gate
generate: _Generate
patch: _Patch
restore: _Restore

__all__ = [
    "Backend",
    "BackendError",
    "ClipModel",
    "FineTuned",
    "GatedModel",
    "Guard",
    "Neighbors",
    "PreservationOutput",
    "RetargetOutput",
    "SafeBank",
    "__version__",
    "backends",
    "describe",
    "evaluate",
    "export",
    "fine_tune",
    "fit_guard",
    "gate",
    "generate",
    "info_nce",
    "load",
    "load_clip",
    "load_gate",
    "load_guard",
    "nearest_safe",
    "patch",
    "preservation_loss",
    "restore",
    "retarget_loss",
    "use_backend",
]
