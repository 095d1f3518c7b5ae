"""Compile the kernels for GPUs that are not here, and print what the assembler says of each, as JSON lines.

Run without TRITON_INTERPRET; no GPU is needed:

    python tests/head/compile_kernels.py 80 90 | markdown | amd
"""

import inspect
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from bco_fast.kernels import configs
from bco_fast.kernels.fold_logits import fold_logits_kernel, rescale_rows_kernel
from bco_fast.kernels.head_backward import dlogits_kernel
from bco_fast.kernels.head_logps import head_logps_kernel, merge_splits_kernel
from bco_fast.kernels.sparse_backward import (
    add_products_kernel,
    gathered_dlogits_kernel,
    gathered_dweight_kernel,
    gathered_product_kernel,
)

# Shared memory that one program may use, bytes (CUDA programming guide, technical specifications).
SMEM_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
MMA = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
HEAD = {"LOGIT_SCALE": 1.0, "SOFTCAP": 30.0, "TEMPERATURE": 1.0}


def cases():
    """(name, kernel, pointer and scalar types, constants, launch config): every kernel with its default configs."""
    for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for extras in (False, True):
            config = configs.head_logps(itemsize, extras=extras)
            types = _types(
                dtype, "hidden weight bias", fp32="part mass", integers="N V D SPLIT stride_hn stride_wv stride_mn"
            )
            flags = _flags(extras, "BIAS SOFTCAP ENTROPY MASS") | {"ACC": tl.float32, "UPCAST": False}
            blocks = {"BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "BLOCK_D": config.block_d}
            name = f"head_logps {dtype}{' bias softcap entropy mass' if extras else ''}"
            yield name, head_logps_kernel, types, HEAD | flags | blocks, config
    statistics = "row_max row_sum logp entropy grad_logp grad_entropy"
    for dtype in ("bf16", "fp16", "fp32"):
        config = configs.DLOGITS
        types = _types(dtype, "bias out", fp32=f"tile {statistics}", integers="N V FIRST C stride_tn stride_on")
        blocks = {"BLOCK_N": config.block_n, "BLOCK_V": config.block_v}
        yield (
            f"dlogits {dtype}",
            dlogits_kernel,
            types,
            HEAD | _flags(True, "BIAS SOFTCAP GRAD_ENTROPY") | blocks,
            config,
        )
    folds = ("", "OUT", "BIAS SOFTCAP ENTROPY OUT", "BIAS SOFTCAP ENTROPY MASS")
    for dtype, wanted in itertools.product(("bf16", "fp16", "fp32"), folds):
        config = configs.fold_logits(16384, extras="BIAS" in wanted, out="OUT" in wanted)
        integers = "N V FIRST C STATE stride_tn stride_on stride_mn"
        types = _types(dtype, "bias out", fp32="tile state mass", integers=integers)
        blocks = {"BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "WIDTH": 256}
        flags = _flags(False, "BIAS SOFTCAP ENTROPY MASS OUT") | _flags(True, wanted)
        yield f"fold_logits {dtype} {wanted.lower()}".strip(), fold_logits_kernel, types, HEAD | flags | blocks, config
    for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        low = itemsize == 2
        gathered = (
            ("dlogits", gathered_dlogits_kernel, configs.gathered_dlogits(itemsize, extras=False), False, False),
            ("dlogits", gathered_dlogits_kernel, configs.gathered_dlogits(itemsize, extras=True), True, False),
            ("dweight", gathered_dweight_kernel, configs.GATHERED_DWEIGHT if low else configs.GATHERED_DWEIGHT_FP32, True, False),
            ("product", gathered_product_kernel, configs.GATHERED_PRODUCT if low else configs.GATHERED_PRODUCT_FP32, True, False),
            ("dlogits", gathered_dlogits_kernel, configs.gathered_dlogits(itemsize, extras=False), False, True),
            ("dlogits", gathered_dlogits_kernel, configs.gathered_dlogits(itemsize, extras=True), True, True),
            ("dweight", gathered_dweight_kernel, configs.GATHERED_DWEIGHT, True, True),
        )  # fmt: skip
        for name, kernel, config, extras, scattered in gathered[: None if low else 4]:
            types = _types(
                dtype,
                "hidden weight bias out dz d_weight",
                fp32="row_max row_sum logp grad_logp carry_in carry_out d_bias product",
                integers="FIRST_TILE FIRST LAST V D stride_hn stride_wv stride_zn",
            )
            blocks = {"BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "BLOCK_D": config.block_d}
            constants = blocks | {"HAS_WEIGHT": True, "TILE": 256, "SCATTERED": scattered, "ACC": tl.float32}
            constants |= (HEAD if name == "dlogits" else {}) | _flags(extras, "BIAS SOFTCAP")
            constants = {n: c for n, c in constants.items() if n in kernel.arg_names}
            suffix = (" bias softcap" if extras and name == "dlogits" else "") + " scattered" * scattered
            yield f"gathered_{name} {dtype}{suffix}", kernel, types, constants, config
    config = configs.RESCALE_ROWS
    blocks = {"BLOCK_N": config.block_n, "BLOCK_D": config.block_d}
    yield "rescale_rows", rescale_rows_kernel, _types("fp32", "", fp32="sums shrink", integers="N D"), blocks, config
    config = configs.ADD_PRODUCTS
    types = _types("fp32", "product", fp32="d_hidden", integers="D")
    yield "add_products", add_products_kernel, types, {"BLOCK_D": config.block_d}, config
    config = configs.MERGE_SPLITS
    types = _types("fp32", "part", fp32="row_max row_sum logp logit entropy", integers="N V S")
    constants = {"BLOCK_N": config.block_n, "HAS_ENTROPY": True, "ACC": tl.float32}
    yield "merge_splits", merge_splits_kernel, types, constants, config


def _types(dtype: str, operands: str, *, fp32: str, integers: str) -> dict[str, str]:
    types = {f"{name}_ptr": f"*{dtype}" for name in operands.split()}
    types |= {f"{name}_ptr": "*fp32" for name in fp32.split()}
    types |= {"part_argmax_ptr": "*i32"}
    types |= dict.fromkeys(["target_ptr", "argmax_ptr", "rows_ptr", "offset_ptr", "place_ptr", "row_start_ptr"], "*i64")
    return types | dict.fromkeys(integers.split(), "i32")


def _flags(value: bool, names: str) -> dict[str, bool]:
    return {f"HAS_{name}": value for name in names.split()}


def compile_for(capability: int, kernel, types: dict, constants: dict, config, target: GPUTarget | None = None):
    names = kernel.arg_names
    types = {n: t for n, t in types.items() if n in names and n not in constants}
    # A launch specialises on divisibility by 16: pointers from the allocator, and every stride of a real model.
    aligned = [
        n
        for n in types
        if n.endswith("_ptr") or n in ("D", "SPLIT", "stride_hn", "stride_wv", "stride_tn", "stride_on", "stride_zn")
    ]
    source = ASTSource(
        fn=kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=target or GPUTarget("cuda", capability, 32), options=options)


def resources(binary, capability: int) -> dict:
    """Registers a thread, spilled bytes, shared memory, whether a tensor-core instruction is there."""
    # The assembler that a launch would use; Triton 3.5 has one for all generations.
    tool = get_ptxas(*[capability] * len(inspect.signature(get_ptxas).parameters)).path
    architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(binary.asm["ptx"])
        command = [tool, "-v", f"--gpu-name={architecture}", source, "-o", Path(folder) / "kernel.cubin"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": max(int(n) for n in re.findall(r"Used (\d+) registers", log)),
        "spill_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)),
        "smem_bytes": binary.metadata.shared,
        "smem_limit": SMEM_LIMIT[capability],
        "tensor_core": MMA[capability] in binary.asm["ptx"],
    }


def report(capabilities: list[int]) -> Iterator[dict]:
    for capability in capabilities:
        for name, kernel, types, constants, config in cases():
            binary = compile_for(capability, kernel, types, constants, config)
            yield {"kernel": name, "sm": capability, **resources(binary, capability)}


def markdown(rows: list[dict]) -> str:
    """One line a kernel, one column a GPU: registers and shared memory; spills would be written out."""
    capabilities = sorted({row["sm"] for row in rows})
    lines = ["| kernel | " + " | ".join(f"sm_{c}" for c in capabilities) + " |", "|---" * (len(capabilities) + 1) + "|"]
    by_kernel: dict[str, dict[int, str]] = {}
    for row in rows:
        spilled = f", **{row['spill_bytes']} B spilled**" if row["spill_bytes"] else ""
        cell = f"{row['registers']} reg, {row['smem_bytes'] / 1024:.0f} KiB{', MMA' if row['tensor_core'] else ''}{spilled}"
        by_kernel.setdefault(row["kernel"], {})[row["sm"]] = cell
    lines += [f"| {name} | " + " | ".join(cells[c] for c in capabilities) + " |" for name, cells in by_kernel.items()]
    return "\n".join(lines)


def amd(architecture: str = "gfx942") -> Iterator[dict]:
    """The same kernels for an AMD GPU, as far as Triton's wheel goes: an object file, and what it says of itself."""
    for name, kernel, types, constants, config in cases():
        binary = compile_for(0, kernel, types, constants, config, target=GPUTarget("hip", architecture, 64))
        text = binary.asm["amdgcn"]
        yield {
            "kernel": name,
            "gfx": architecture,
            "spill_bytes": 4 * max(int(n) for n in re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)),
            "smem_bytes": binary.metadata.shared,
            "smem_limit": 65536,
            "matrix_core": "v_mfma" in text,
        }


if __name__ == "__main__":
    if "amd" in sys.argv[1:]:
        for row in amd():
            print(json.dumps(row), flush=True)
    elif "markdown" in sys.argv[1:]:
        print(markdown(list(report([80, 86, 89, 90, 100, 120]))))
    else:
        for row in report([int(c) for c in sys.argv[1:]]):
            print(json.dumps(row), flush=True)
