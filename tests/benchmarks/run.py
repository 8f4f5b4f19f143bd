"""Runs the benchmarks and writes bench.md and bench.json: `make bench`, `make bench ONLY=train`, `... DATA=DIR`."""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from tests.benchmarks import (
    copies,
    external,
    gpu,
    leaks,
    predicting,
    preparation,
    reading,
    recipes,
    roof,
    scaling,
    startup,
    train,
)
from tests.benchmarks.measure import machine

PARTS = {
    "train": train.run,
    "roof": roof.run,
    "reading": reading.run,
    "preparation": preparation.run,
    "startup": startup.run,
    "scaling": scaling.run,
    "copies": copies.run,
    "leaks": leaks.run,
    "recipes": recipes.run,
    "predicting": predicting.run,
    "gpu": gpu.run,
    "external": external.run,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--data", help="folder of radiographs, for the parts that can use one")
    args = parser.parse_args()
    facts = {"date": f"{datetime.now(UTC):%Y-%m-%d}"} | machine()
    lines = [", ".join(f"{name} {value}" for name, value in facts.items()), ""]
    figures = {}
    for name in [args.only] if args.only else PARTS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        part = PARTS[name](args.data)
        lines += [f"## {name}", "", *part.lines, ""]
        figures[name] = part.figures
        Path("bench.md").write_text("\n".join(lines))
        Path("bench.json").write_text(json.dumps({"machine": facts, "parts": figures}, indent=1) + "\n")
    print("\n".join(lines))
