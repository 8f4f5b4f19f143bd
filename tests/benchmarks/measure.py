"""How the parts of the benchmark measure: contestants take turns, and the results are medians and ratios of turns."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fracture.config import SampleConfig
from fracture.preparation.sample import make_sample
from fracture.storage import storage_path

Figures = dict[str, list[float]]  # contestant -> one value a round


@dataclass
class Part:
    """What one part of the benchmark found."""

    lines: list[str]  # of Markdown
    figures: dict[str, Any] = field(default_factory=dict)  # for bench.json


def take_turns(contestants: Mapping[str, Callable[[], float]], rounds: int) -> Figures:
    """A B C A B C ...: what a drifting machine does to one, it does to all."""
    figures: Figures = {name: [] for name in contestants}
    for number in range(rounds):
        for name, measure in contestants.items():
            started = time.monotonic()
            figures[name].append(measure())
            figure = f"{figures[name][-1]:.4g} ({time.monotonic() - started:.0f} s)"
            print(f"  round {number + 1} of {rounds}: {name}: {figure}", file=sys.stderr, flush=True)
    return figures


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def ratio(a: list[float], b: list[float]) -> str:
    """Of a to b, round by round."""
    return spread([x / y for x, y in zip(a, b, strict=True)])


def child(command: list[str], **environment: str) -> Any:
    """Runs a program, and reads the JSON that the last line of its output is."""
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def radiographs_and_shards(scratch: str, radiograph_ids: int) -> tuple[str, str]:
    """Two folders: generated radiographs, and the shards made of them."""
    folder, shards = f"{scratch}/radiographs", f"{scratch}/shards"
    make_sample(storage_path(folder), SampleConfig(images=radiograph_ids))
    prepare = [sys.executable, "job/preprocess.py", "--data", folder, "--out", shards]
    subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    return folder, shards


def machine() -> dict[str, str]:
    """What the figures hold for."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(facts.get("flags", "").split())
    matrix = [name for name in ("amx_bf16", "avx512_bf16", "avx512f") if name in flags]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": f"{len(os.sched_getaffinity(0))} × {facts.get('model name', platform.machine())}",
        "features": ", ".join(matrix) or "no AVX-512",
        "memory": f"{memory:.0f} GiB",
        "python": platform.python_version(),
        **{name: version(name) for name in ("tensorflow", "keras", "ray", "pyarrow")},
    }
