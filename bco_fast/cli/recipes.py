"""`bco-fast recipes`: the configuration files that come with bco_fast.

bco-fast train --config bco_ultrafeedback
accelerate launch --config_file "$(bco-fast recipes zero3)" -m bco_fast train ...
"""

from __future__ import annotations

from pathlib import Path

from .common import Parser, UsageError, nearest
from .config_file import RECIPES

FOLDERS = {
    "for `bco-fast train` and `online`, as --config NAME": RECIPES,
    "for `bco-fast reproduce NAME`": RECIPES / "experiments",
    'for accelerate launch, as --config_file "$(bco-fast recipes NAME)"': RECIPES.parent / "accelerate_configs",
}


def recipes(arguments: list[str]) -> None:
    """Prints a list, or the path of one of them."""
    parser = Parser(prog="bco-fast recipes", description="List the recipes that come with bco_fast, or print a path.")
    parser.add_argument("name", nargs="?", help="print the path of this one")
    wanted = parser.parse_args(arguments).name
    files = {path.stem: path for folder in FOLDERS.values() for path in sorted(folder.glob("*.yaml"))}
    if wanted is not None:
        name = Path(wanted).name.removesuffix(".yaml")
        if name not in files:
            raise UsageError(f"no recipe {wanted!r}{nearest(name, files)}")
        print(files[name])
        return
    for title, folder in FOLDERS.items():
        print(f"{title}\n")
        for path in sorted(folder.glob("*.yaml")):
            print(f"    {path.stem:28}{_about(path)}")
        print()


def _about(path: Path) -> str:
    """What the comment at its beginning says, without commands."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line.removeprefix("#").strip() for line in lines[:6] if line.startswith("#")]
    text = next((line for line in comments if not line.startswith(("accelerate launch", "bco-fast"))), "")
    return text if len(text) <= 84 else f"{text[:84].rpartition(' ')[0]} ..."
