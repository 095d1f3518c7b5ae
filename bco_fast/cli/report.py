"""`bco-fast report`: plots and a table of runs on one HTML page."""

from __future__ import annotations

from .common import Parser, check_output, usage_errors


def report(arguments: list[str]) -> dict:
    parser = Parser(prog="bco-fast report", description="Plots and a table of runs, on one HTML page.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run, finished or still training")
    parser.add_argument(
        "--output",
        metavar="FILE.html",
        help="the page, with PNG files beside it (default: report.html, in the run's folder or, for several runs, here)",
    )
    options = parser.parse_args(arguments)
    if options.output is not None:
        check_output("--output", options.output)
    with usage_errors(ImportError, prefix="bco-fast report needs matplotlib: pip install 'bco_fast[train]': "):
        from ..evaluation.report import write_report
    with usage_errors(ValueError):
        return write_report(options.runs, options.output)
