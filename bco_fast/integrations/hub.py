"""The fused head as a package for the Hugging Face Hub's `kernels` library.

    python -m bco_fast.integrations.hub build/hub --repo-id USER/bco-fast-head

The files of `bco_fast/head` and `kernels/` are copied byte by byte; only `_ops.py`, which holds the operators' namespace,
is written anew. `kernels` may load several versions into one process, so the namespace ends in a hash of the files. The
result is a kernel-builder project (`build.toml`, `flake.nix`, `torch-ext/`) and, because there is nothing to compile, also
what kernel-builder would make of it (`build/torch-*`). See docs/hub.md.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import sys
from pathlib import Path

NAME = "bco-fast-head"
PACKAGE = "bco_fast_head"
VERSION = 0
"""Of the package's interface. By convention of the Hub, 0 is one that may still change."""
BACKENDS = ("cpu", "cuda", "rocm")
ROOT = Path(__file__).resolve().parents[1]

_INIT = '''"""Log-probabilities of given tokens straight from hidden states and the lm-head weight; the logits never exist."""

from .head.linear_logps import fused_linear_logps
from .head.types import HeadStats, NotFiniteError

__all__ = ["HeadStats", "NotFiniteError", "fused_linear_logps"]
'''

_OPS = '''"""Where the operators are registered: a namespace that no other package and no other version has."""

import torch

_NAMESPACE = "{id}"
ops = getattr(torch.ops, _NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    return _NAMESPACE + "::" + name
'''

_FLAKE = """{
  description = "Fused lm-head log-probabilities";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""

_CARD = """---
library_name: kernels
license: apache-2.0
---
# bco-fast-head

The log-probability of each target token under an lm-head, without the [tokens, vocabulary] logits: float32 whatever the
inputs are, 4NDV FLOP for forward and backward with a frozen head, temporary memory capped by `workspace_bytes`. Triton on a
GPU from sm_80 on, plain PyTorch elsewhere. It needs PyTorch 2.10 or newer. It is the operator of bco_fast {version}.

```python
from kernels import get_kernel

head = get_kernel("{repo_id}", version={number}, trust_remote_code=True)
logps = head.fused_linear_logps(hidden, lm_head.weight, targets)  # targets[i] is the token that hidden[i] predicts
```
"""


def _source_files() -> dict[str, bytes]:
    """Path inside the package -> contents, without what depends on the namespace."""
    files = {"__init__.py": _INIT.encode(), "kernels/__init__.py": b""}
    for folder in ("head", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            files[f"{folder}/{path.relative_to(ROOT / folder).as_posix()}"] = path.read_bytes()
    # kernel-builder writes _ops.py beside the package's __init__.py; the head looks for it in its own folder.
    files["head/_ops.py"] = (
        b"from .._ops import add_op_namespace_prefix, ops\n\n__all__ = ['add_op_namespace_prefix', 'ops']\n"
    )
    return files


def _variant(backend: str, sources: dict[str, bytes]) -> dict[str, bytes]:
    """The files of `build/torch-BACKEND`, as kernel-builder lays them out."""
    text = b"\0".join(name.encode() + b"\0" + data for name, data in sorted(sources.items()))
    identity = f"_{PACKAGE}_{backend}_{hashlib.sha256(text).hexdigest()[:10]}"
    files = sources | {"_ops.py": _OPS.format(id=identity).encode()}
    digests = {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in sorted(files.items())}
    metadata = {
        "id": identity,
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return files | {"metadata.json": (json.dumps(metadata, indent=2) + "\n").encode()}


def build(out: Path, repo_id: str) -> list[Path]:
    """Write the package into `out`, a new or empty folder, for upload as `repo_id` ("USER/bco-fast-head").

    Returns:
        The variant folders, `out/build/torch-cpu` and so on.

    Raises:
        FileExistsError: `out` has something in it.
        ValueError: `repo_id` is not "USER/NAME".
    """
    from .. import __version__

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"--repo-id must be USER/NAME, not {repo_id!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty: name a new folder")
    toml = (
        f'[general]\nname = "{NAME}"\nversion = {VERSION}\nedition = 5\nlicense = "Apache-2.0"\n'
        f"backends = {json.dumps(BACKENDS)}\n\n[general.hub]\nrepo-id = {json.dumps(repo_id)}\n\n[torch-noarch]\n"
    )
    card = _CARD.format(version=__version__, repo_id=repo_id, number=VERSION)
    sources = _source_files()
    files = {"build.toml": toml.encode(), "flake.nix": _FLAKE.encode(), "CARD.md": card.encode()}
    files |= {f"torch-ext/{PACKAGE}/{name}": data for name, data in sources.items()}
    for backend in BACKENDS:
        files |= {f"build/torch-{backend}/{name}": data for name, data in _variant(backend, sources).items()}
    for name, data in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    return [out / "build" / f"torch-{backend}" for backend in BACKENDS]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bco_fast.integrations.hub", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a new folder for the package")
    parser.add_argument("--repo-id", required=True, help="where it will be uploaded, USER/NAME")
    args = parser.parse_args(argv)
    try:
        for path in build(args.out, args.repo_id):
            print(path)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
