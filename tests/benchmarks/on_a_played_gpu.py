"""A program of benchmarks/ as on a GPU that the CPU plays, with small shapes; its own processes come here too.

TRITON_INTERPRET=1 python tests/benchmarks/on_a_played_gpu.py gpu_suite.py --out DIR
"""

import functools
import itertools
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the trial of a peer has no PYTHONPATH
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import counts
import cuda_on_cpu
import gpu_probe
import gpu_suite
import long_context
import torch
import tune

cuda_on_cpu.install()
SMALL = replace(long_context.SHAPES["small"], V=600)
for name in counts.MODELS:
    long_context.SHAPES[name] = SMALL
gpu_probe.SHAPE, gpu_probe.WIDTHS, gpu_probe.FROZEN = (64, 48, 600, None), (61, 60, 56, 48), ((64, 96), (16, 384))
gpu_suite.SHAPES = {"Llama-3-8B": (96, 48, 1300, None)}
gpu_suite.CHECKED_ROWS, gpu_suite.GROWTH = 64, ((32, 64), (500, 1000), 32)
gpu_suite.STEPS = [(shape, case, 64) for shape, case, _ in gpu_suite.STEPS]
gpu_suite.CONTEXTS = [(shape, case, 64) for shape, case, _ in gpu_suite.CONTEXTS]
gpu_suite.SHARED = gpu_suite.SHARED[0], (64, 2, 16)
gpu_suite.measured_limits = lambda device, dtype, *, size: counts.measured_limits(device, dtype, size=128)
_parts = gpu_suite.parts
gpu_suite.parts = lambda smoke: {
    name: (600.0, work) for name, (_, work) in _parts(smoke).items()
}  # on a loaded machine
tune.WIDTHS, tune.TOKENS, tune.VOCABULARY = (64,), 70, 600
_candidates = tune.candidates
tune.candidates = lambda: itertools.islice(_candidates(), 3)
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # Inductor would ask the GPU more than it answers
for module in (gpu_suite, long_context):
    module.__file__ = __file__  # what they start is this file

PROGRAMS = {"gpu_probe.py": gpu_probe, "gpu_suite.py": gpu_suite, "tune.py": tune}
if __name__ == "__main__":
    program = PROGRAMS.get(sys.argv[1])
    if program:
        del sys.argv[1]
    else:  # a part of the suite or a trial of the long contexts
        program = long_context if "--trial" in sys.argv else gpu_suite
    program.main()
