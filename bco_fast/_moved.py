"""Import paths from before the package had rooms. They work for one more minor version, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable

MODULES = {
    "bench": ("cli.bench",),
    "cache": ("reference.cache", "data.keys"),
    "chat": ("data.chat",),
    "checkpoints": ("training.checkpoints",),
    "composition": ("data.samplers",),
    "config": ("training.config",),
    "demo": ("cli.demo",),
    "embedders": ("data.embedders",),
    "fused": ("losses.fused",),
    "generation": ("evaluation.generate",),
    "generators": ("online.generators",),
    "judge": ("evaluation.judge",),
    "loading": ("models.load",),
    "logps": ("head.linear_logps",),
    "loss_output": ("losses.output",),
    "memory": ("models.memory",),
    "metrics": ("losses.metrics",),
    "model_card": ("training.model_card",),
    "online_prompts": ("data.prompts",),
    "packing": ("data.batch", "data.samplers", "training.checks"),
    "paired": ("losses.paired",),
    "recipes": ("data.convert",),
    "references": ("reference.fill", "reference.identity"),
    "report": ("evaluation.report",),
    "reward_shift": ("losses.reward_shift",),
    "rewards": ("online.rewards",),
    "rows": ("data.rows",),
    "sequences": ("losses.sequence",),
    "shifts": ("evaluation.shifts",),
    "sources": ("data.sources",),
    "trainer": ("training.trainer",),
    "trl_compat": ("training.trl_compat",),
    "udm": ("data.density_ratio",),
}
"""Old module -> where its names are now."""


def _warn(old: str, new: str, stacklevel: int) -> None:
    text = f"{old} has moved to {new}; the old path goes with the next minor version"
    warnings.warn(text, DeprecationWarning, stacklevel=stacklevel)


class _Loader(importlib.abc.Loader):
    def __init__(self, old: str):
        self.old = old

    def create_module(self, spec):
        return None

    def exec_module(self, module) -> None:
        homes = [importlib.import_module(f"bco_fast.{home}") for home in MODULES[self.old]]
        _warn(f"bco_fast.{self.old}", " and ".join(home.__name__ for home in homes), stacklevel=7)
        for home in reversed(homes):
            vars(module).update({name: value for name, value in vars(home).items() if not name.startswith("__")})


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        package, _, old = fullname.rpartition(".")
        if package != "bco_fast" or old not in MODULES:
            return None
        return importlib.util.spec_from_loader(fullname, _Loader(old))


def install() -> None:
    """Make `import bco_fast.<old module>` work."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def old_names(package: str, homes: dict[str, str]) -> Callable[[str], object]:
    """A package's `__getattr__` for names that its module of that name had: name -> module below bco_fast."""

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        _warn(f"{package}.{name}", f"bco_fast.{homes[name]}", stacklevel=3)
        return getattr(importlib.import_module(f"bco_fast.{homes[name]}"), name)

    return get
