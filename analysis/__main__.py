"""python -m analysis RUN: the report of a run as one HTML file."""

import argparse
import importlib
import sys


def main(arguments: list[str] | None = None) -> int:
    """Write the report and print its path.  Returns the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis",
        description="Write the report of a run: one HTML file that opens offline.",
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a run (with run.json), or its URI")
    parser.add_argument("--out", metavar="FILE", help="where to write the report (default: RUN/report.html)")
    asked = parser.parse_args(arguments)
    # Imported only now, so that --help does not wait for plotly and pyarrow.
    report = importlib.import_module("analysis.report")
    try:
        print(report.write(asked.run, asked.out))
    except (ValueError, OSError) as error:
        print(f"analysis: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
