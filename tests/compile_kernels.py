"""Compile the kernels for GPUs that are not here, and print what the assembler says of each, as JSON lines.

Run without TRITON_INTERPRET; no GPU is needed:

    python tests/compile_kernels.py 80 90
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from bco_fast.kernels import configs
from bco_fast.kernels.head_backward import dlogits_kernel
from bco_fast.kernels.head_logps import head_logps_kernel, merge_splits_kernel

# Shared memory that one program may use, bytes (CUDA programming guide, technical specifications).
SMEM_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
MMA = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
HEAD = {"LOGIT_SCALE": 1.0, "SOFTCAP": 30.0, "TEMPERATURE": 1.0}


def cases():
    """(name, kernel, pointer and scalar types, constants, launch config)."""
    floats = {"logp_ptr": "*fp32", "row_max_ptr": "*fp32", "row_sum_ptr": "*fp32", "entropy_ptr": "*fp32"}
    for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for extras in (False, True):
            config = configs.head_logps(itemsize, extras=extras)
            types = {f"{n}_ptr": f"*{dtype}" for n in ("hidden", "weight", "bias")}
            types |= {"target_ptr": "*i64", "part_ptr": "*fp32"}
            types |= dict.fromkeys(("N", "V", "D", "SPLIT", "stride_hn", "stride_wv"), "i32")
            flags = {
                "HAS_BIAS": extras,
                "HAS_SOFTCAP": extras,
                "HAS_ENTROPY": extras,
                "ACC": tl.float32,
                "UPCAST": False,
            }
            blocks = {"BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "BLOCK_D": config.block_d}
            name = f"head_logps {dtype}{' bias softcap entropy' if extras else ''}"
            yield name, head_logps_kernel, types, HEAD | flags | blocks, config
    for dtype in ("bf16", "fp16", "fp32"):
        config = configs.DLOGITS
        types = floats | {"tile_ptr": "*fp32", "bias_ptr": f"*{dtype}", "target_ptr": "*i64", "out_ptr": f"*{dtype}"}
        types |= dict.fromkeys(("grad_logp_ptr", "grad_entropy_ptr"), "*fp32")
        types |= dict.fromkeys(("N", "V", "FIRST", "C", "stride_tn", "stride_on"), "i32")
        flags = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "HAS_GRAD_ENTROPY": True}
        blocks = {"BLOCK_N": config.block_n, "BLOCK_V": config.block_v}
        yield f"dlogits {dtype}", dlogits_kernel, types, HEAD | flags | blocks, config
    config = configs.MERGE_SPLITS
    types = floats | {
        "part_ptr": "*fp32",
        "target_ptr": "*i64",
        "logp_ptr": "*fp32",
        "N": "i32",
        "V": "i32",
        "S": "i32",
    }
    constants = {"BLOCK_N": config.block_n, "HAS_ENTROPY": True, "ACC": tl.float32}
    yield "merge_splits", merge_splits_kernel, types, constants, config


def compile_for(capability: int, kernel, types: dict, constants: dict, config):
    names = kernel.arg_names
    # A launch specialises on divisibility by 16: pointers from the allocator, and every stride of a real model.
    aligned = [
        n
        for n in types
        if n.endswith("_ptr") or n in ("D", "SPLIT", "stride_hn", "stride_wv", "stride_tn", "stride_on")
    ]
    source = ASTSource(
        fn=kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(binary, capability: int) -> dict:
    """Registers a thread, spilled bytes, shared memory, whether a tensor-core instruction is there."""
    tool = get_ptxas(capability).path  # the assembler that a launch would use
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


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for name, kernel, types, constants, config in cases():
            binary = compile_for(capability, kernel, types, constants, config)
            print(json.dumps({"kernel": name, "sm": capability, **resources(binary, capability)}), flush=True)
