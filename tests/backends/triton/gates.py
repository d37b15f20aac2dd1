"""Compiles every kernel in every tuning configuration for chips that are not here, and reports what came out.

Run as a script (never under TRITON_INTERPRET): `python gates.py sm_90 gfx942` prints a JSON object a variant.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}
HIP_SHARED_LIMITS = {"gfx942": 64 << 10, "gfx950": 160 << 10}
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "sm_120": "mma.sync"}
WIDE_TILES = ("sm_90", "sm_100")


SCALED = dict(inverse="fp32", inverse_scaled="fp32")


class Variant(NamedTuple):
    kernel: str  # "module.kernel"
    pointers: dict[str, str]  # argument -> element type, or a descriptor's "tensordesc<...>"
    floats: tuple[str, ...]  # float32 scalar arguments; every other scalar is int32
    constants: dict  # constexpr arguments
    warps: int
    stages: int
    product: str = ""  # "tensor", "ieee" or none
    maxnreg: int | None = None
    fusion: bool = True  # fused multiply-adds

    @property
    def label(self) -> str:
        shown = ",".join(f"{key}={value}" for key, value in self.constants.items())
        return f"{self.kernel}[{'/'.join(sorted(set(self.pointers.values())))} {shown} warps={self.warps}]"


def variants(hip: bool, wide: bool, shared_limit: int) -> list[Variant]:
    """All of them for CUDA; for AMD, where nothing can be tuned or measured, the first of each kernel and dtype."""
    found = [*_row_variants(), *_search_variants(hip, wide, shared_limit)]
    found += _info_nce_variants()
    if wide:
        found += _group_variants()
    if hip:
        first = {(variant.kernel, *sorted(variant.pointers.values())): variant for variant in reversed(found)}
        found = list(first.values())
    return found


def _configs(configs, itemsize: int, block_rows: int, keep: int, limit: int, wide: bool):
    from saferclip_fast.ops.triton.configs import fits

    return [config for config in configs if fits(config, block_rows, itemsize, keep, limit, wide)]


def _row_variants() -> list[Variant]:
    from saferclip_fast.ops.triton.shared import row_warps

    weights = ("weight_0", "weight_1", "weight_2", "weight_3")
    found = [Variant("shared.sum_terms_kernel", dict(row_terms="fp32", terms="fp32", loss="fp32"), weights,
                     dict(SLABS=2, BLOCK=512), 4, 3)]  # fmt: skip
    for dtype, block in (("bf16", 1024), ("fp32", 2048)):
        rows = dict.fromkeys(("text", "image", "frozen_text", "frozen_image"), dtype)
        found.append(
            Variant("retarget_loss.retarget_kernel",
                    {**rows, "bank_text": dtype, "bank_image": dtype, "neighbors": "i64", "neighbor_weights": "fp32",
                     "row_weights": "fp32", "row_terms": "fp32", "grad_text": dtype, "grad_image": dtype},
                    (*weights, "beta", "margin"), dict(CURRENT=False, NEED_GRAD=True, BLOCK=block), row_warps(block), 3)
        )  # fmt: skip
        found.append(
            Variant("preservation_loss.rows_kernel", {**rows, **SCALED, "scaled": dtype, "cosines": "fp32"}, (),
                    dict(BLOCK=block), row_warps(block), 3)
        )  # fmt: skip
        found.append(
            Variant("info_nce.scale_kernel", {**SCALED, "matrix": dtype, "scaled": dtype}, (), dict(BLOCK=block),
                    row_warps(block), 3)
        )  # fmt: skip
        for cosine in (False, True):
            found.append(
                Variant("info_nce.finish_kernel",
                        {**SCALED, "along": "fp32", "scaled": dtype, "frozen": dtype, "inverse_frozen": "fp32",
                         "share": "fp32", "grad": dtype}, ("weight_cosine",), dict(COSINE=cosine, BLOCK=block),
                        row_warps(block), 3)
            )  # fmt: skip
        found.append(
            Variant("neighbor_hinge.hinge_kernel",
                    dict(x=dtype, rows="fp32", indices="i64", scores="fp32", row_weights="fp32", values="fp32",
                         grad=dtype),
                    ("margin", "share", "margin_share"), dict(NEED_GRAD=True, BLOCK=block), row_warps(block), 3)
        )  # fmt: skip
        found.append(
            Variant("nearest_safe.prepare_kernel", dict(query="fp32", scaled=dtype, length="fp32", slack="fp32"),
                    ("relative",), dict(BLOCK=block), row_warps(block), 3)
        )  # fmt: skip
    return found


def _search_variants(hip: bool, wide: bool, limit: int) -> list[Variant]:
    from saferclip_fast.ops.triton import nearest_safe
    from saferclip_fast.ops.triton.configs import SCREEN

    precision = "ieee" if hip else "tf32"
    found = []
    for dtype, block_rows, keep in (
        ("bf16", 16, 8), ("bf16", 64, 8), ("bf16", 128, 8), ("bf16", 64, 64), ("bf16", 16, 256), ("bf16", 16, 512),
        ("fp16", 64, 16), ("fp32", 16, 8), ("fp32", 64, 8), ("fp32", 128, 8),
    ):  # fmt: skip
        if block_rows == 128 and not wide:
            continue
        for config in _configs(SCREEN, 4 if dtype == "fp32" else 2, block_rows, keep, limit, wide):
            found.append(
                Variant("nearest_safe.screen_kernel", dict(scaled=dtype, columns=dtype, kept="i64", squares="fp32"), (),
                        dict(KEEP=keep, PRECISION=precision, BLOCK_ROWS=block_rows, **config.kwargs),
                        config.num_warps, config.num_stages, "tensor", config.maxnreg)
            )  # fmt: skip
    found_keys = dict(kept="i64", scores="fp32", indices="i64", again="i32", again_count="i32")
    bounds = dict(squares="fp32", slack="fp32")
    for dtype, k, keep, splits, block in (("bf16", 1, 8, 512, 1024), ("fp32", 128, 256, 16, 2048)):
        rows = dict(query=dtype, bank=dtype)
        slots = dict(KEEP=keep, SPLITS=splits)
        found += [
            Variant("nearest_safe.decide_kernel", {**rows, **found_keys, **bounds}, (),
                    dict(K=k, BEST=k, BLOCK=block, **slots), nearest_safe.SLOT_WARPS, 3),
            Variant("nearest_safe.search_again_kernel",
                    {**rows, **found_keys, **bounds, "scaled": dtype, "length": "fp32"}, (),
                    dict(PRECISION=precision, ROWS=nearest_safe.AGAIN_ROWS, BLOCK_BANK=nearest_safe.AGAIN_BANK,
                         BLOCK_WIDTH=nearest_safe.AGAIN_WIDTH, **slots), 4, 3, "tensor"),
            Variant("nearest_safe.merge_again_kernel", found_keys, (), slots, nearest_safe.SLOT_WARPS, 3),
        ]  # fmt: skip
    return found


def _group_variants() -> list[Variant]:
    """The screen of groups, for the chips that take it."""
    from saferclip_fast.ops.triton import grouped_screen as groups
    from saferclip_fast.ops.triton.configs import GROUPED

    rows, columns, width = GROUPED.kwargs.values()
    members, found = columns // groups.LANES.value, []
    values = dict(best="fp32", second="fp32")
    for dtype, scaled in (("fp16", True), ("fp16", False), ("bf16", False)):
        tile = f"tensordesc<{dtype}[{{}}, {width}]>"
        descriptors = dict(scaled=tile.format(rows), columns=tile.format(columns))
        found.append(
            Variant("grouped_screen.screen_groups_kernel", {**descriptors, **values, "facts": "fp32"}, (),
                    dict(SCALED=scaled, **GROUPED.kwargs), GROUPED.num_warps, GROUPED.num_stages, "tensor")
        )  # fmt: skip
    for dtype, copy in (("fp32", True), ("bf16", False)):
        found.append(
            Variant("grouped_screen.copy_kernel", dict(bank=dtype, rows="fp16" if copy else dtype, facts="fp32"), (),
                    dict(COPY=copy, BLOCK=1024), 4, 3)
        )  # fmt: skip
    found.append(
        Variant("grouped_screen.largest_kernel", dict(facts="fp32", header="i64", squares="fp32", errors="fp32"), (),
                dict(ERRORS=True, HEADER=True), 4, 3)
    )  # fmt: skip
    for k in (1, 32, 256):
        capacity = groups.capacity_for(k)
        found.append(
            Variant("grouped_screen.candidates_kernel",
                    {**values, "squares": "fp32", "errors": "fp32", "slack": "fp32", "length": "fp32", "scores": "fp32",
                     "listed": "i32", "counts": "i32", "again": "i32", "again_count": "i32"}, (),
                    dict(K=k, MEMBERS=members, CAPACITY=capacity, SPLITS=16, MERGED=groups.MERGED), 4, 3)
        )  # fmt: skip
        for dtype in ("fp32", "bf16"):
            found.append(
                Variant("grouped_screen.score_kernel",
                        dict(query=dtype, bank=dtype, listed="i32", counts="i32", keys="i64", scores="fp32",
                             indices="i64"), (),
                        dict(K=k, BEST=k, CAPACITY=capacity, BLOCK=1024, ROWS=groups.SCORED_ROWS,
                             BLOCK_WIDTH=groups.SCORED_WIDTH), 4, 3)
            )  # fmt: skip
    return found


def _info_nce_variants() -> list[Variant]:
    from saferclip_fast.ops.triton import info_nce

    facts = dict(chunk="fp32", inverse_x="fp32", inverse_y="fp32", rows="fp32", columns="fp32")
    tiles = dict(TILE_ROWS=info_nce.TILE_ROWS, TILE_COLUMNS=info_nce.TILE_COLUMNS)
    warps, found = info_nce.LAUNCH["num_warps"], []
    for masked in (False, True):
        sizes = dict(MASKED=masked, COLUMNS=info_nce.COLUMNS)
        pointers = {**facts, "mask": "u8" if masked else "fp32"}
        found.append(
            Variant("info_nce.sums_kernel", pointers, ("logit_scale",), {**sizes, **tiles}, warps, 3, fusion=False)
        )
        found += [
            Variant("info_nce.weights_kernel", {**pointers, "weights": dtype}, ("logit_scale",), sizes, warps, 3,
                    fusion=False)
            for dtype in ("bf16", "fp16", "fp32")
        ]  # fmt: skip
    return found


def compile_variant(variant: Variant, chip: str) -> dict:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = variant.kernel.split(".")
    kernel = getattr(importlib.import_module(f"saferclip_fast.ops.triton.{module}"), name)
    kernel = getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel
    signature, attributes = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in variant.constants:
            signature[argument] = "constexpr"
        elif argument in variant.pointers:
            kind = variant.pointers[argument]
            signature[argument] = kind if kind.startswith("tensordesc") else "*" + kind
        else:
            signature[argument] = "fp32" if argument in variant.floats else "i32"
        # what a torch allocation and d = 512, 768 ... promise, and a batch that is a multiple of 16
        if signature[argument].startswith("*") or argument in ("width", "column_count"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    constants = {(kernel.arg_names.index(key),): value for key, value in variant.constants.items()}
    hip = chip.startswith("gfx")
    target = GPUTarget("hip", chip, 64) if hip else GPUTarget("cuda", int(chip[3:]), 32)
    options = dict(num_warps=variant.warps, num_stages=variant.stages, enable_fp_fusion=variant.fusion)
    if variant.maxnreg and not hip:
        options["maxnreg"] = variant.maxnreg
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)
    report = dict(label=variant.label, product=variant.product, shared=compiled.metadata.shared)
    if hip:
        return {**report, **_hip_facts(compiled.asm["amdgcn"])}
    if name == "screen_groups_kernel":  # the one whose instructions are counted: taking code apart takes half a second
        report["instructions"] = _instructions(compiled.asm["cubin"])
    return {**report, **_cuda_facts(compiled.asm["cubin"], compiled.asm["ptx"])}


def _cuobjdump(cubin: bytes, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _cuda_facts(cubin: bytes, ptx: str) -> dict:
    usage = _cuobjdump(cubin, "-res-usage")
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups())
    found = [name for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma") if name in ptx]
    wide = bool(
        re.search(
            r"cp\.async\.cg\.shared\.global.*0x10|(?:ld|st)\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v2\.b64", ptx
        )
    )
    fused = "fma.rn.f32" in ptx
    bulk = "cp.async.bulk.tensor" in ptx  # TMA
    flushed = "max.ftz" in ptx or "min.ftz" in ptx
    return dict(registers=registers, spilled=stack + local, tensor=found, tf32="tf32" in ptx, wide=wide, fused=fused,
                bulk=bulk, flushed=flushed)  # fmt: skip


def _instructions(cubin: bytes) -> dict[str, int]:
    """Machine instructions of the kinds that cost the screens most, and all."""
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_]+)", _cuobjdump(cubin, "-sass"))
    return {name: names.count(name) for name in ("FMNMX", "FMNMX3", "LOP3", "FMUL", "SHFL")} | {"all": len(names)}


def _hip_facts(assembly: str) -> dict:
    spilled = sum(map(int, re.findall(r"[vs]gpr_spill_count: +(\d+)", assembly)))
    registers = max(map(int, re.findall(r"\.vgpr_count: +(\d+)", assembly)))
    wide = "_dwordx4" in assembly
    tensor = ["mfma"] if "v_mfma" in assembly else []
    return dict(registers=registers, spilled=spilled, tensor=tensor, tf32="xf32" in assembly, wide=wide)


def main(chips: list[str]) -> None:
    for chip in chips:
        hip = chip.startswith("gfx")
        limit = (HIP_SHARED_LIMITS if hip else SHARED_LIMITS)[chip]
        for variant in variants(hip, chip in WIDE_TILES, limit):
            try:
                report = compile_variant(variant, chip)
            except Exception as error:
                report = dict(label=variant.label, error=f"{type(error).__name__}: {error}"[:400])
            print(json.dumps({"chip": chip, **report}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
