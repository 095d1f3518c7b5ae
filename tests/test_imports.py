"""Who may import whom, and what importing the package costs."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bco_fast"
STANDARD = set(sys.stdlib_module_names)

# Bottom first: a room imports itself and the rooms before it. Beside them and the standard library, what each may import.
ROOMS = {
    "_moved": set(),
    "files": set(),
    "head": {"torch", "triton", "bco_fast.kernels"},
    "losses": {"torch"},
    "models": {"liger_kernel", "peft", "torch", "tqdm", "transformers"},
    "data": {"datasets", "jinja2", "numpy", "pyarrow", "sklearn", "torch", "tqdm", "transformers"},
    "reference": {"numpy", "torch", "tqdm"},
    "training": {"accelerate", "numpy", "safetensors", "torch", "transformers"},
    "online": {"numpy", "torch", "transformers", "vllm"},
    "evaluation": {"httpx", "matplotlib", "numpy", "torch", "tqdm", "transformers"},
    "integrations": {"axolotl", "pydantic", "torch", "transformers", "trl"},
    "cli": {"matplotlib", "numpy", "pyarrow", "tokenizers", "torch", "tqdm", "transformers", "yaml"},
    "__main__": set(),
}
ONLY_THERE = {
    "triton": {"head.backends.triton", "head.backends.launching", "head.sparse.triton"},
    "liger_kernel": {"models.liger"},
    "axolotl": {"integrations.axolotl"},
    "trl": {"integrations.trl"},
    "datasets": {"data.sources"},
    "sklearn": {"data.density_ratio", "data.embedders"},
    "vllm": {"online.generators"},
    "httpx": {"evaluation.endpoint"},
}
"""Packages that few need, and the modules that may ask for them."""


def _name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    _name(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "kernels" not in path.relative_to(PACKAGE).parts and path != PACKAGE / "__init__.py"
}


def _imports(name: str, *, typing: bool = True) -> set[str]:
    """Modules that a module imports, at its top or in a function; ours from bco_fast on, others by their package."""
    path, found = MODULES[name], set()
    package = f"bco_fast.{name}".split(".")[: None if path.name == "__init__.py" else -1]
    tree = ast.parse(path.read_text())
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in set(ast.walk(tree)) - (set() if typing else skipped):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            home = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                inner = ".".join([*home, alias.name]).removeprefix("bco_fast.")
                found.add(f"bco_fast.{inner}" if inner in MODULES else ".".join(home))
    return found - STANDARD


def _room(module: str) -> str:
    return module.removeprefix("bco_fast.").split(".")[0]


def test_every_module_is_in_a_room():
    assert {_room(name) for name in MODULES} == set(ROOMS)


@pytest.mark.parametrize("name", MODULES)
def test_a_room_imports_only_rooms_below_it(name):
    below = list(ROOMS)[: list(ROOMS).index(_room(name)) + 1]
    for module in _imports(name, typing=False):
        if module.startswith("bco_fast.kernels"):
            assert "bco_fast.kernels" in ROOMS[_room(name)]
        elif module.startswith("bco_fast."):
            assert _room(module) in below, f"{name} imports {module}"
        elif module != "bco_fast":
            assert module in ROOMS[_room(name)], f"{name} imports {module}"
            assert name in ONLY_THERE.get(module, {name})


def test_backends_do_not_import_one_another():
    for name in ("reference", "torch", "triton"):
        others = {f"bco_fast.head.backends.{other}" for other in ("reference", "torch", "triton")}
        assert not _imports(f"head.backends.{name}") & others


def test_there_is_no_circle():
    arrows = {
        name: {m.removeprefix("bco_fast.") for m in _imports(name, typing=False)} & set(MODULES) for name in MODULES
    }
    while arrows:
        leaves = {name for name, needed in arrows.items() if not needed & set(arrows) - {name}}
        assert leaves, f"a circle among {sorted(arrows)}"
        arrows = {name: needed for name, needed in arrows.items() if name not in leaves}


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


CALL = "bco_fast.fused_linear_logps(torch.ones(2, 3), torch.eye(4, 3), torch.tensor([0, 1])"


@pytest.fixture(scope="session")
def fresh():
    """What a new interpreter says: the modules loaded by the import, its log of three calls, and how it refuses triton."""
    code = (
        "import sys, json, logging, torch, bco_fast, bco_fast.head.linear_logps, bco_fast.losses.unpaired\n"
        "loaded = sorted(sys.modules)\n"
        "logging.basicConfig(level='INFO', format='%(message)s', stream=sys.stdout)\n"
        f"for _ in range(3): {CALL})\n"
        f"try: {CALL}, backend='triton')\n"
        "except RuntimeError as error: print(error)\n"
        "print(json.dumps(loaded))"
    )
    *said, loaded = _python(code).splitlines()
    return set(json.loads(loaded)), said


def test_importing_the_package_loads_torch_only(fresh):
    loaded, _ = fresh
    assert "bco_fast.losses.unpaired" in loaded
    assert not loaded & {
        "triton",
        "transformers",
        "matplotlib",
        "safetensors",
        "tokenizers",
        "bco_fast.head.backends.triton",
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


def test_triton_on_the_cpu_is_refused_not_replaced(fresh):
    assert "backend='triton' needs a GPU" in fresh[1][-1]


def test_auto_says_once_what_it_chose(fresh):
    assert sum("backend 'torch' on cpu" in line for line in fresh[1]) == 1


def test_public_names_exist_and_are_documented():
    import bco_fast

    for name in bco_fast.__all__:
        assert getattr(bco_fast, name).__doc__, name
    with pytest.raises(AttributeError, match="nothing"):
        _ = bco_fast.nothing


OLD = ("trainer.FeedbackTrainer", "models.patch_model", "data.load_feedback", "references.reference_id", "cache.row_key", "packing.TokenBudgetSampler")  # fmt: skip


@pytest.mark.slow
def test_old_paths_work_and_say_where_they_went():
    code = (
        "import importlib, json, warnings, bco_fast; warnings.simplefilter('always')\n"
        "found = {}\n"
        f"for old in {OLD}:\n"
        "    module, _, name = old.rpartition('.')\n"
        "    with warnings.catch_warnings(record=True) as seen:\n"
        "        exec(f'from bco_fast.{module} import {name}')\n"
        "    said = [str(w.message) for w in seen if w.category is DeprecationWarning and 'bco_fast' in str(w.message)]\n"
        "    found[old] = (str(said), globals()[name].__module__)\n"
        "print(json.dumps(found))"
    )
    found = json.loads(_python(code).splitlines()[-1])
    assert set(found) == set(OLD)
    for old, (said, home) in found.items():
        assert f"bco_fast.{old.rpartition('.')[0]}" in said, old
        assert home in said, old
        assert "__main__" not in said, old


def test_names_of_transformers_5_have_no_place_where_4_is_allowed():
    """`make test-oldest` runs them all; this is what slips in most easily. `PretrainedConfig` is known to both."""
    newer = re.compile(r"\b(PreTrainedConfig|is_flash_attention_requested)\b")
    assert not [path.name for path in PACKAGE.rglob("*.py") if newer.search(path.read_text())]
