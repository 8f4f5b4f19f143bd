"""Runs the benchmarks and writes their report: `make bench`, `make bench ONLY=copies DATA=DIR`."""

import argparse
import platform
from datetime import UTC, datetime
from pathlib import Path

from tests.benchmarks import copies, leaks, recipes

PARTS = {"copies": copies.run, "leaks": leaks.run, "recipes": recipes.run}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--data", help="folder of radiographs, for the parts that can use one")
    parser.add_argument("--out", default="bench.md")
    args = parser.parse_args()
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    lines = [f"{datetime.now(UTC):%Y-%m-%d}, {machine}", ""]
    for name in [args.only] if args.only else PARTS:
        lines += [f"## {name}", "", *PARTS[name](args.data), ""]
    Path(args.out).write_text("\n".join(lines))
    print("\n".join(lines))
