"""`bco-fast convert`: the rows of a public dataset as feedback."""

from __future__ import annotations

import dataclasses
import math

from .common import Parser, UsageError, check_input, check_output, nearest, usage_errors


def convert(arguments: list[str]) -> dict:
    from ..data.convert import FORMATS, RANKINGS, RECIPES, TIES, convert_file

    parser = Parser(prog="bco-fast convert", description="Write a dataset's rows as feedback.")
    parser.add_argument("--data", required=True, help="JSONL, JSON, CSV or Parquet file, or a dataset on the Hub")
    parser.add_argument("--recipe", required=True, help=f"one of {', '.join(RECIPES)}")
    parser.add_argument(
        "--to", required=True, choices=["pairs", "chosen", "binary", "score", "prompts"], help="kind of rows"
    )
    parser.add_argument("--output", required=True, help="JSONL file to write")
    parser.add_argument("--threshold", type=float, help="lowest score of a thumbs up (default: the recipe's)")
    parser.add_argument(
        "--rank_by",
        choices=RANKINGS,
        help="of helpsteer2's two responses, the chosen one has more: helpfulness, or score, the weighted sum of three "
        "attributes (default: helpfulness)",
    )
    parser.add_argument(
        "--ties",
        choices=TIES,
        help="helpsteer2 to binary: drop prompts whose two responses are equally helpful, as BCO's paper does, or keep "
        "every response (default: drop)",
    )
    parser.add_argument("--split", help="of a dataset on the Hub (default: train)")
    parser.add_argument(
        "--format",
        default="auto",
        choices=FORMATS,
        help="chat: every row as messages; text: as strings, conversations left out; auto: one turn as text",
    )
    parser.add_argument(
        "--on_bad_row",
        default="error",
        choices=("error", "skip"),
        help="on a row of another schema: error names it and writes nothing, skip leaves it out",
    )
    options = vars(parser.parse_args(arguments))
    recipe, output = options.pop("recipe"), options.pop("output")
    if recipe not in RECIPES:
        raise UsageError(f"--recipe: unknown recipe {recipe!r}{nearest(recipe, RECIPES)}")
    if not math.isfinite(options["threshold"] or 0.0):
        raise UsageError(f"--threshold must be a finite number, not {options['threshold']}")
    check_input("--data", options["data"])
    check_output("--output", output, options["data"])
    with usage_errors(ValueError, OSError, ImportError):
        report = convert_file(options.pop("data"), output, recipe, **options)
    return {**dataclasses.asdict(report), "output": output}
