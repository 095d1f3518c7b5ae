"""bco-fast: the command line. The last line of `train`, `online` and `demo` on standard output is one line of JSON."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys

from .common import UsageError, nearest

COMMANDS = {
    "train": ("--model PATH --data FILE --output_dir DIR", "align a model from feedback"),
    "online": ("--model PATH --prompts FILE --reward REWARD --output_dir DIR", "align it on its own completions"),
    "cache": ("build|inspect|verify|export|prune", "the reference log-probabilities on disk"),
    "demo": ("[--output_dir DIR]", "the whole method on a tiny model, in half a minute"),
    "convert": ("--data FILE --recipe NAME --to KIND --output FILE", "a public dataset as feedback"),
    "udm": ("--data FILE --embedder tfidf --output FILE", "weights that match the prompts of both classes"),
    "report": ("RUN [RUN ...] [--output FILE.html]", "plots and a table of runs, on one page"),
    "bench": ("[--model PATH]", "what the fused head saves on this machine"),
    "generate": ("--model PATH --prompts FILE --output FILE", "completions, as AlpacaEval or Arena-Hard"),
    "judge": ("A B --reward PATH|module:function", "win rate of completions A against B"),
    "shifts": ("--model A --ref_model B --data FILE --output_dir DIR", "what training did to the tokens"),
}
"""Each is the function of that name in the module of that name: its arguments in, what it prints as JSON out."""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("bco_fast").setLevel(logging.INFO)
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"    {f'bco-fast {name} {usage}':80}{about}" for name, (usage, about) in COMMANDS.items()]
        print("\n".join([__doc__, "", *lines, "", "`bco-fast train --help` lists every option."]))
        return 0
    if arguments[0] == "--version":
        from .. import __version__

        print(f"bco_fast {__version__}")
        return 0
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise UsageError(f"unknown command {command!r}{nearest(command, COMMANDS)}")
        summary = getattr(importlib.import_module(f".{command}", __name__), command)(rest)
    except UsageError as error:
        if not error.of_all_ranks or os.environ.get("RANK", "0") == "0":
            print(f"bco-fast: error: {error}", file=sys.stderr)
        return 2
    if summary is not None:
        print(json.dumps(summary), flush=True)
    return 0
