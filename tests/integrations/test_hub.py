"""The head as a package of the Hub: one source, loadable beside bco_fast, and what the `kernels` library asks of it."""

import ast
import importlib.util
import json
import sys
from pathlib import Path

import heads
import pytest
import torch

from bco_fast import fused_linear_logps
from bco_fast.integrations import hub

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "package"
    hub.build(out, "someone/bco-fast-head")
    return out


@pytest.fixture(scope="module")
def loaded(package):
    """The package as `kernels` imports it: from its path, under its id, once in a process."""
    folder = package / "build" / "torch-cpu"
    name = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _same_as_ours(theirs, backend):
    case = heads.case(9, 70, 33, bias=True)
    results = []
    for call in (theirs, fused_linear_logps):
        leaves = [t.float().detach().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
        logps = call(leaves[0], leaves[1], case.targets, bias=leaves[2], softcap=5.0, backend=backend)
        (logps * case.upstream.float()).sum().backward()
        results.append([logps.detach(), *(leaf.grad for leaf in leaves)])
    assert all(grad.abs().max() > 0 for grad in results[0])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_it_computes_the_same_bits_beside_bco_fast(loaded, backend):
    assert loaded.__all__ == ["HeadStats", "NotFiniteError", "fused_linear_logps"]
    assert loaded.fused_linear_logps is not fused_linear_logps
    _same_as_ours(loaded.fused_linear_logps, backend)


def test_every_file_but_the_namespace_is_ours(package):
    for variant in [*(package / "build").iterdir(), package / "torch-ext" / hub.PACKAGE]:
        written = {p.relative_to(variant).as_posix() for p in variant.rglob("*.py")} - {"__init__.py", "_ops.py"}
        own = {"kernels/__init__.py", "head/_ops.py"}
        assert {"head/linear_logps.py", "head/sparse/triton.py", "kernels/configs.py"} < written
        for name in written - own:
            home = ROOT / name if name.startswith("kernels/") else ROOT / "bco_fast" / name
            assert (variant / name).read_bytes() == home.read_bytes(), name


def test_it_is_python_3_9_and_imports_torch_and_triton_only(package):
    for path in (package / "build" / "torch-cuda").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 9))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for module in modules:
                assert module.split(".")[0] in {"torch", "triton"} | set(sys.stdlib_module_names), (path.name, module)


def test_each_content_has_a_namespace_of_its_own(package, tmp_path, monkeypatch):
    (tmp_path / "head").mkdir()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "head" / "linear_logps.py").write_text("# another version")
    monkeypatch.setattr(hub, "ROOT", tmp_path)
    hub.build(tmp_path / "out", "someone/bco-fast-head")
    ids = {json.loads(p.read_text())["id"] for root in (package, tmp_path / "out") for p in root.rglob("metadata.json")}
    assert len(ids) == 2 * len(hub.BACKENDS)
    assert all(name.isidentifier() for name in ids)


def test_mistakes_are_one_line(package, tmp_path, capsys):
    assert hub.main([str(package), "--repo-id", "a/b"]) == 2
    assert hub.main([str(tmp_path / "new"), "--repo-id", "nobody"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "is not empty" in said[0]
    assert "--repo-id must be USER/NAME" in said[1]
    assert not (tmp_path / "new").exists()


def test_the_kernels_library_loads_it(tmp_path, monkeypatch):
    kernels = pytest.importorskip("kernels.load", reason="needs the kernels library: pip install kernels")
    from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

    monkeypatch.setattr(hub, "_INIT", hub._INIT + "# a second version in this process\n")
    package = tmp_path / "package"
    hub.build(package, "someone/bco-fast-head")
    assert len(Build.open(package).general.backends) == len(hub.BACKENDS)
    for variant in (package / "build").iterdir():
        found = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
        Metadata.read_from_file(variant / "metadata.json").digest.validate(found)
    local = kernels.get_local_kernel(package / "build")
    for backend in ("torch", "triton"):
        _same_as_ours(local.fused_linear_logps, backend)
    monkeypatch.setenv("LOCAL_KERNELS", f"someone/bco-fast-head={package / 'build'}")
    assert kernels.get_kernel("someone/bco-fast-head", version=hub.VERSION) is local
