"""bco-fast: the command line. The last line of `train`, `online` and `demo` on standard output is one line of JSON."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable

from .common import UsageError, _nearest

COMMANDS = ("train", "online", "demo", "cache", "convert", "udm", "generate", "report", "bench", "judge", "shifts")
"""Each is the function of that name in the module of that name beside this one."""


def _command(name: str) -> Callable[[list[str]], dict | None]:
    return getattr(importlib.import_module(f".{name}", __name__), name)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("bco_fast").setLevel(logging.INFO)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(__doc__ + "\n    bco-fast train --model PATH --data FILE --output_dir DIR   align a model from feedback"
                  "\n    bco-fast online --model PATH --prompts FILE --reward REWARD --output_dir DIR   align it on its own completions"
                  "\n    bco-fast cache build|inspect|verify|export|prune           the reference log-probabilities on disk"
                  "\n    bco-fast demo [--output_dir DIR]                            the whole story on a tiny model"
                  "\n    bco-fast convert --data FILE --recipe NAME --to KIND --output FILE   a public dataset as feedback"
                  "\n    bco-fast udm --data FILE --embedder tfidf --output FILE     weights that match the classes' prompts"
                  "\n    bco-fast report RUN [RUN ...] [--output FILE.html]          plots and a table of runs, on one page"
                  "\n    bco-fast bench [--model PATH]                               what the fused head saves on this machine"
                  "\n    bco-fast generate --model PATH --prompts FILE --output FILE   completions, as AlpacaEval or Arena-Hard"
                  "\n    bco-fast judge A B --reward PATH|module:function            win rate of completions A against B"
                  "\n    bco-fast shifts --model A --ref_model B --data FILE --output_dir DIR   what training did to the tokens"
                  "\n\n`bco-fast train --help` lists every option.")  # fmt: skip
            return 0
        if arguments[0] == "--version":
            from .. import __version__

            print(f"bco_fast {__version__}")
            return 0
        if arguments[0] not in COMMANDS:
            raise UsageError(f"unknown command {arguments[0]!r}{_nearest(arguments[0], COMMANDS)}")
        summary = _command(arguments[0])(arguments[1:])
    except UsageError as error:
        print(f"bco-fast: error: {error}", file=sys.stderr)
        return 2
    if summary is not None:
        print(json.dumps(summary), flush=True)
    return 0
