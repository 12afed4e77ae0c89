"""`adakd report`: one page and some pictures of what happened in training runs."""

from __future__ import annotations

import sys
from pathlib import Path

from . import CommandError, CommandParser, is_disk_full

try:
    from ..report.page import write_report
except ImportError as error:
    raise CommandError(f"a report needs matplotlib: pip install matplotlib ({error})") from error


def run(argv: list[str]) -> int:
    """Write the report, say on stderr what it lacks, and print where it is.

    Raises:
        CommandError: a folder without a run, or an output folder that cannot be written to.
    """
    parser = CommandParser(
        prog="adakd report",
        description="Write one HTML page and PNGs of what happened in training runs, several of them side by side: "
        "losses, share, difficulties, temperatures, held-out KLs, throughput, memory, and the tokens of some records "
        "before and after training. The page needs no network.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="the output_dir of a training run")
    parser.add_argument("--output_dir", default="report", help="folder for report.html and the PNGs (default: report)")
    options = parser.parse_args(argv)
    try:
        runs = write_report(options.runs, options.output_dir)
    except ValueError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        if is_disk_full(error):
            raise
        raise CommandError(f"output_dir {options.output_dir}: cannot be written to: {error.strerror}") from error
    for each in runs:
        for text in each.missing:
            print(f"adakd report: {each.name}: {text}", file=sys.stderr)
    print(Path(options.output_dir) / "report.html")
    return 0
