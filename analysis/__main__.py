"""python -m analysis RUN [RUN ...]: the report of a run, or of several to compare, as one HTML file."""

import argparse
import importlib
import sys


def main(arguments: list[str] | None = None) -> int:
    """Write the report and print its path.  Returns the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis",
        description="Write the report of a run: one HTML file that opens offline, and its numbers as Parquet, CSV and "
        "JSON in a folder beside it.  Several runs are compared if they share their images.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="the folder of a run (with run.json), or its URI")
    parser.add_argument(
        "--out", metavar="FILE", help="where to write the report (default: report.html in the first RUN)"
    )
    parser.add_argument(
        "--max-weights",
        metavar="N",
        type=float,
        help="what a model may have at most to be called small (default: half of what the best one has)",
    )
    asked = parser.parse_args(arguments)
    # Imported only now, so that --help does not wait for plotly and pyarrow.
    report = importlib.import_module("analysis.report")
    try:
        print(report.write(asked.runs, asked.out, asked.max_weights))
    except (ValueError, OSError) as error:
        print(f"analysis: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
