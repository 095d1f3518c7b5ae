"""bco-fast: the command line. The last line of `train`, `online` and `demo` on standard output is one line of JSON."""

from __future__ import annotations

from .common import UsageError, _Parser


def report(arguments: list[str]) -> dict:
    """Plots of runs on one page."""
    from ..evaluation.report import write_report
    from ..evaluation.run_reading import ReportError

    parser = _Parser(
        prog="bco-fast report", allow_abbrev=False, description="Plots and a table of runs, on one HTML page."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run, finished or still training")
    parser.add_argument(
        "--output",
        metavar="FILE.html",
        help="the page; PNG files are written beside it (default: report.html in the run's folder; of several runs, here)",
    )
    options = parser.parse_args(arguments)
    try:
        from ..evaluation.report import write_report
        from ..evaluation.run_reading import ReportError
    except ImportError as error:
        raise UsageError(f"{error}; bco-fast report needs matplotlib: pip install 'bco_fast[train]'") from None
    try:
        return write_report(options.runs, options.output)
    except ReportError as error:
        raise UsageError(" ".join(str(error).split())) from None
