"""Who may import whom, and what importing the package costs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bco_fast"
STANDARD = set(sys.stdlib_module_names)

# module -> what it may import beside the standard library; bco_fast modules by their name
ARROWS = {
    "__init__": set(),
    "_backends/__init__": {"torch"},
    "_backends/reference": {"torch", "_backends"},
    "_backends/chunked": {"torch", "_backends"},
    "_backends/launching": {"torch", "triton", "kernels", "_backends"},
    "_backends/triton_sparse": {"torch", "triton", "kernels", "_backends", "launching"},
    "_backends/triton": {"torch", "triton", "kernels", "_backends", "launching", "triton_sparse"},
    "_cells": {"torch", "_backends"},
    "_ops": {"torch", "_backends", "_cells"},
    "_parallel": {"torch", "_ops", "_backends"},
    "logps": {"torch", "_ops", "_parallel", "_backends"},
    "sequences": {"torch"},
    "_checks": {"torch"},
    "reward_shift": {"torch"},
    "metrics": {"torch"},
    "loss_output": {"torch", "metrics"},
    "paired": {"torch", "_checks", "loss_output", "sequences"},
    "losses": {"torch", "_checks", "loss_output", "paired", "reward_shift", "sequences"},
    "fused": {"torch", "logps", "losses", "reward_shift", "sequences"},
    "_key_index": {"numpy"},
    "_shards": {"numpy"},
    "cache": {"numpy", "_key_index", "_shards"},
    "cache_cli": {"numpy", "torch", "pyarrow", "cache", "_shards", "cli", "composition", "data", "files", "losses", "models", "references"},
    "checkpoints": {"torch", "safetensors", "transformers", "files"},
    "resume": {"accelerate", "transformers", "checkpoints"},
    "sources": {"datasets", "pyarrow"},
    "chat": {"sources"},
    "rows": {"chat", "sources"},
    "data": {"numpy", "torch", "tqdm", "cache", "chat", "rows", "sources"},
    "composition": {"torch", "data"},
    "models": {"torch", "logps"},
    "references": {"numpy", "torch", "tqdm", "cache", "data", "models", "packing"},
    "config": {"torch", "transformers", "losses", "reward_shift"},
    "loading": {"torch", "transformers", "peft", "config"},
    "memory": {"torch"},
    "packing": {"torch", "data", "models", "sequences"},
    "trainer": {
        "torch", "transformers", "cache", "chat", "composition", "config", "data", "loading", "loss_output", "memory", "metrics",
        "models", "packing", "references", "resume", "reward_shift", "run_record", "numpy", "logps",
    },
    "model_card": set(),
    "run_record": {"torch", "transformers", "config", "data", "files", "memory", "model_card"},
    "run_reading": {"numpy"},
    "plots": {"numpy", "matplotlib", "run_reading"},
    "report": {"matplotlib", "files", "plots", "run_reading"},
    "files": set(),
    "generation": {"torch", "tqdm", "files"},
    "judge_cli": {"numpy", "torch", "transformers", "cli", "data", "generation", "judge", "rewards", "shifts"},
    "shifts": {"numpy", "torch", "matplotlib", "data", "files"},
    "judge": {"numpy", "generation", "rewards"},
    "recipes": {"files", "sources"},
    "embedders": {"numpy", "sklearn", "torch", "transformers", "sources"},
    "udm": {"numpy", "sklearn", "embedders", "files", "sources", "__init__"},
    "integrations/__init__": set(),
    "integrations/trl": {"torch", "transformers", "trl", "losses", "models", "reward_shift", "sequences"},
    "rewards": {"torch", "transformers", "data"},
    "generators": {"torch", "vllm", "generation"},
    "online_prompts": {"chat", "generation", "sources"},
    "online": {
        "numpy", "torch", "transformers", "chat", "composition", "config", "data", "files", "generators", "models", "online_prompts", "packing", "references", "rewards", "trainer",
    },
    "online_cli": {"checkpoints", "cli", "memory", "online", "rewards"},
    "trl_compat": {"transformers", "config", "trainer"},
    "demo": {
        "torch", "tokenizers", "tqdm", "transformers", "matplotlib", "cli", "config", "data", "models", "sequences", "online",
    },
    "cli": {
        "torch", "transformers", "bench", "cache", "cache_cli", "chat", "checkpoints", "config", "config_file", "data", "sources", "loading", "memory", "online_cli", "recipes", "report", "udm", "trainer", "demo", "judge_cli", "__init__",
    },
    "bench": {"torch", "transformers", "logps"},
    "trl_yaml": set(),
    "config_file": {"yaml", "trl_yaml"},
}  # fmt: skip


def _imports(path: Path):
    """Names of imported modules: top-level packages, or the part of a relative import below bco_fast."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0 or node.module:
                yield node.module.split(".")[0]
            else:  # from . import x: names of this package
                for alias in node.names:
                    is_module = (path.parent / f"{alias.name}.py").exists()
                    yield (
                        alias.name
                        if is_module or (depth == 1 and alias.name in ("_ops", "_parallel"))
                        else path.parent.name
                        if depth > 1
                        else "__init__"
                    )


def _modules():
    return {str(p.relative_to(PACKAGE).with_suffix("")): p for p in PACKAGE.rglob("*.py") if "kernels" not in p.parts}


def test_every_module_has_its_arrows():
    assert set(_modules()) == set(ARROWS)


@pytest.mark.parametrize("module", ARROWS)
def test_arrows(module):
    found = set(_imports(_modules()[module])) - STANDARD
    assert found <= ARROWS[module], f"{module} must not import {found - ARROWS[module]}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_triton_and_nothing_else(path):
    found = {n.split(".")[0] for n in _absolute(path)} - STANDARD
    assert found <= {"triton"}
    assert not (ROOT / "kernels" / "__init__.py").exists()


def _absolute(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def _python(code: str, **environment) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT / "tests",
        env={**_environment(), **environment},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def _environment():
    import os

    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def test_importing_the_package_loads_torch_only():
    code = "import sys, json, bco_fast, bco_fast.logps, bco_fast.losses; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(_python(code)))
    assert not loaded & {
        "triton",
        "transformers",
        "matplotlib",
        "safetensors",
        "tokenizers",
        "bco_fast._backends.triton",
    }


def test_the_schemas_need_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, bco_fast\n"
        "print(bco_fast.fused_linear_logps(torch.ones(2, 3), torch.eye(4, 3), torch.tensor([0, 1])).shape)\n"
        "try: bco_fast.fused_linear_logps(torch.ones(2, 3), torch.eye(4, 3), torch.tensor([0, 1]), backend='triton')\n"
        "except RuntimeError as error: print(error)"
    )
    first, second = _python(code).splitlines()
    assert first == "torch.Size([2])"
    assert "pip install triton" in second


def test_triton_on_the_cpu_is_refused_not_replaced():
    code = (
        "import torch, bco_fast\n"
        "try: bco_fast.fused_linear_logps(torch.ones(2, 3), torch.eye(4, 3), torch.tensor([0, 1]), backend='triton')\n"
        "except RuntimeError as error: print(error)"
    )
    assert "backend='triton' needs a GPU" in _python(code)


def test_auto_says_once_what_it_chose():
    code = (
        "import logging; logging.basicConfig(level='INFO', format='%(message)s')\n"
        "import torch, bco_fast, sys\n"
        "for _ in range(3): bco_fast.fused_linear_logps(torch.ones(2, 3), torch.eye(4, 3), torch.tensor([0, 1]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert run.stderr.count("backend 'torch' on cpu") == 1


def test_public_names_exist_and_are_documented():
    import bco_fast

    for name in bco_fast.__all__:
        assert getattr(bco_fast, name).__doc__, name
    with pytest.raises(AttributeError, match="nothing"):
        _ = bco_fast.nothing
