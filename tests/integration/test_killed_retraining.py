"""A retraining that is killed at each of its stages in turn, and run again until it is finished."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fracture.registry.registry import Registry
from fracture.storage import storage_path
from tests.conftest import ROOT
from tests.integration.test_retraining import SETTINGS, retraining, watched, write_radiographs

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.usefixtures("ray_cluster")]
DIES = """
import os, re, signal, sys
from fracture.cli import main
from fracture.storage import StoragePath
pattern, left = sys.argv[1], int(sys.argv[2])
def dying(what):
    def done(self, *arguments):
        global left
        if re.search(pattern, self.path):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return what(self, *arguments)
    return done
StoragePath.write_bytes, StoragePath.delete = dying(StoragePath.write_bytes), dying(StoragePath.delete)
sys.exit(main(["retrain", *sys.argv[3:]]))
"""
STAGES = {  # pattern of the path that it is about to write or remove -> at which of these times it is killed
    "1 lock": ("locks/retraining/", 1),
    "2 anything new": ("ticks/2026-w46/state.json", 1),
    "3 preprocess": ("shards/.*/files.parquet", 1),
    "3 prepared": ("ticks/2026-w46/state.json", 1),
    "4 train": ("runs/2026-w46/status.json", 4),
    "4 tested": ("runs/2026-w46/bundle/bundle.json", 1),
    "4 added": ("versions/0002/bundle.json", 1),
    "5 gate": ("ticks/2026-w46/scores.parquet", 1),
    "5 decided": ("ticks/2026-w46/decision.json", 1),
    "6 recorded": ("history/000002.json", 1),
    "6 promote": ("champion.json", 1),
    "8 retention": ("runs/2026-w45$", 1),  # what nobody needs is removed before the web hook is notified
    "7 notified": ("ticks/2026-w46/state.json", 1),
}


def weeks(folder: Path) -> tuple[Path, Path]:
    write_radiographs(folder / "radiographs", range(40))
    assert retraining(folder / "radiographs", folder / "registry", "2026-w45") == 0
    write_radiographs(folder / "radiographs", range(100, 125))
    return folder / "radiographs", folder / "registry"


def end_of(registry: Path) -> dict[str, object]:
    """Return which files there are, and what was decided."""
    files = {file.relative_to(registry).as_posix() for file in registry.rglob("*") if file.is_file()}
    names = {re.sub(r"[0-9a-f]{12}\.parquet", "X.parquet", n) for n in files if "checkpoint_" not in n}
    decided = json.loads((registry / "ticks/2026-w46/decision.json").read_text())
    entries = [(e.number, e.event, e.version, e.champion, e.tick) for e in Registry(storage_path(registry)).history()]
    return {
        "files": {n for n in names if not re.search("tensorboard|stacks|scanned|compared", n)},
        "rules": {rule["name"]: rule["passed"] for rule in decided["rules"]},
        "auc": decided["models"]["challenger"]["radiograph"]["figures"]["auc"]["value"],
        "history": entries,
        "champion": Registry(storage_path(registry)).champion(),
    }


def test_killed_at_each_stage_it_comes_to_the_end_of_one_that_was_not(tmp_path: Path):
    import ray

    data, registry = weeks(tmp_path)
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(registry, undisturbed)
    assert retraining(data, undisturbed, "2026-w46", "--set", "registry.keep=1") == 0

    words = ["--data", str(data), "--registry", str(registry), "--tick", "2026-w46", "--set", "registry.keep=1"]
    words += [word for setting in SETTINGS for word in ("--set", setting)]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    champions = []
    with watched(registry) as seen:
        for stage, (pattern, times) in STAGES.items():
            command = [sys.executable, "-c", DIES, pattern, str(times), *words]
            job = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            assert job.returncode == -signal.SIGKILL, f"{stage}: {job.stdout}\n{job.stderr}"
            champions.append(Registry(storage_path(registry)).champion())
        command = [sys.executable, "job/retrain.py", *words]
        job = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert job.returncode == 0, job.stderr
    assert champions == [1] * 11 + [2] * 2, "the pointer was about to be written when it was killed the eleventh time"
    assert seen == {"0001", "0002"}
    assert end_of(registry) == end_of(undisturbed)
