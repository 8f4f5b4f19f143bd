import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from export import _lines, _name, main

from fracture.evaluation.metrics import compute_metrics
from fracture.storage import storage_path
from tests.conftest import TINY, quick_bundle

JOB = Path(__file__).parents[2] / "job/export.py"


def export(cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(JOB), *arguments], capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    made = quick_bundle(tmp_path / "made", *TINY)
    shutil.move(made, tmp_path / "runs/first/bundle")
    return "runs/first/bundle"


def test_the_screen_says_what_was_written_and_how_to_load_it(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(argparse.Namespace(bundle=bundle, to="tflite", out=None, shards=None, verbose=False))
    written, takes, compared, load, int8, caveat = capsys.readouterr().out.splitlines()
    out = tmp_path / "exports/first/tflite"
    assert re.fullmatch(rf"written    {out}/model.tflite \(0.0 MB\)", written)
    assert takes == "takes      images [N, 32, 32, 1] in [0, 255]; a fracture from 0.5000 on (export.json)"
    assert compared.startswith("compared   model.tflite differs from the bundle's model by at most ")
    assert load == f"load       tensorflow.lite.Interpreter('{out}/model.tflite')"
    assert int8 == "int8       not written: name the shards that the model was trained on with --shards"
    assert caveat.startswith("CAVEAT     SYNTHETIC MODEL")
    assert (out / "export.json").is_file()


@pytest.mark.parametrize(("slipped", "told"), [(0, False), (1, True)])
def test_what_8_bits_cost_is_told(slipped: int, told: bool):
    """Of 40 × 40 pairs one fracture below all normals is 0.025 of the AUC."""
    labels, groups = np.repeat([1, 0], 40), np.arange(80)
    exact = np.repeat([0.9, 0.1], 40)
    quantised = exact.copy()
    quantised[:slipped] = 0.05
    test = {
        name: {"radiograph": compute_metrics(labels, scores, groups, 0.5).model_dump()}
        for name, scores in {"bundle": exact, "model.tflite": exact, "model-int8.tflite": quantised}.items()
    }
    content = {"format": "tflite", "input": {"shape": [None, 32, 32, 1]}, "threshold": 0.5, "test": test}
    lines = _lines(content | {"files": {}, "largest_difference": 0.0}, storage_path("exports"))
    caveat = "CAVEAT     INT8: its AUC is 0.025 below the bundle's. Take the float form."
    assert (lines[-1] == caveat) == told


@pytest.mark.long
def test_a_person_with_keras_3_alone_runs_the_line_that_the_screen_gives(bundle, tmp_path):
    shown = export(tmp_path, "--bundle", bundle, "--to", "keras")
    assert (shown.returncode, shown.stderr) == (0, "")
    [line] = [line.split(maxsplit=1)[1] for line in shown.stdout.splitlines() if line.startswith("load")]
    alone = [sys.executable, "-c", f"import keras; print({line}.input_shape)"]
    assert subprocess.check_output(alone, text=True, cwd="/") == "(None, 32, 32, 1)\n"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/x/runs/first/bundle", "first"),
        ("/x/runs/first/fold-1/bundle", "first-fold-1"),
        ("/x/runs/first/cnn/fold-1/bundle", "first-cnn-fold-1"),
        ("/x/y/first/bundle", "y-first"),
        ("/x/registry/versions/0003", "registry-0003"),
    ],
)
def test_the_name_of_an_export(path: str, name: str):
    assert _name(storage_path(path)) == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "onnx"], "error: {cwd}/nothing is no bundle: bundle.json is missing. A finished run has one"),
        (["--to", "coreml"], "argument --to: invalid choice: 'coreml' (choose from"),
        (["--to", "onnx", "--shards", "x"], "error: --shards are for --to tflite, whose int8 form they calibrate"),
    ],
)
def test_a_mistake_is_told_in_a_line_with_exit_code_2(tmp_path: Path, arguments: list[str], message: str):
    told = export(tmp_path, "--bundle", "nothing", *arguments)
    assert told.returncode == 2
    assert message.format(cwd=tmp_path) in told.stderr
    assert not any(tmp_path.iterdir())
