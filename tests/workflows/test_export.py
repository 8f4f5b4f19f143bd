import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fracture.cli import export_lines, main
from fracture.evaluation.metrics import compute_metrics
from fracture.storage import storage_path
from fracture.workflows.export import name_export
from tests.conftest import TINY, quick_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    made = quick_bundle(tmp_path / "made", *TINY)
    shutil.move(made, tmp_path / "runs/first/bundle")
    return "runs/first/bundle"


def test_the_screen_says_what_was_written_and_how_to_load_it(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--bundle", bundle, "--to", "tflite"]) == 0
    written, takes, compared, load, int8, caveat = capsys.readouterr().out.splitlines()
    out = tmp_path / "exports/first/tflite"
    assert re.fullmatch(rf"written    {out}/model.tflite \(0.0 MB\)", written)
    assert takes == "takes      images [N, 32, 32, 1] in [0, 255]; a fracture from 0.5000 on (export.json)"
    assert compared.startswith("compared   model.tflite differs from the bundle's model by at most ")
    assert load == f"load       tensorflow.lite.Interpreter('{out}/model.tflite')"
    assert int8 == "int8       not written: name the shards that the model was trained on with --shards"
    assert caveat.startswith("CAVEAT     SYNTHETIC MODEL")
    assert (out / "export.json").is_file()


@pytest.mark.parametrize(("slipped", "warned"), [(0, False), (1, True)])
def test_a_caveat_warns_of_what_8_bits_cost(slipped: int, warned: bool):
    """Of 40 × 40 pairs one fracture below all normals is 0.025 of the AUC."""
    labels, groups = np.repeat([1, 0], 40), np.arange(80)
    exact = np.repeat([0.9, 0.1], 40)
    quantised = exact.copy()
    quantised[:slipped] = 0.05
    test = {
        name: {"radiograph": compute_metrics(labels, scores, groups, 0.5).model_dump()}
        for name, scores in {"bundle": exact, "model.tflite": exact, "model-int8.tflite": quantised}.items()
    }
    card = {"format": "tflite", "input": {"shape": [None, 32, 32, 1]}, "threshold": 0.5, "test": test}
    lines = export_lines(card | {"files": {}, "largest_difference": 0.0}, "exports")
    caveat = "CAVEAT     INT8: its AUC is 0.025 below the bundle's. Take the float form."
    assert (lines[-1] == caveat) == warned


@pytest.mark.long
def test_a_person_with_keras_3_alone_runs_the_line_that_the_screen_gives(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--bundle", bundle, "--to", "keras"]) == 0
    shown, error = capsys.readouterr()
    assert error == ""
    [line] = [line.split(maxsplit=1)[1] for line in shown.splitlines() if line.startswith("load")]
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
def test_an_export_is_named_after_its_bundle(path: str, name: str):
    assert name_export(storage_path(path)) == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "onnx"], "error: {cwd}/nothing is no bundle: bundle.json is missing. A finished run has one"),
        (["--to", "coreml"], "argument --to: invalid choice: 'coreml' (choose from"),
        (["--to", "onnx", "--shards", "x"], "error: --shards are for --to tflite, whose int8 form they calibrate"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--bundle", "nothing", *arguments]) == 2
    assert message.format(cwd=tmp_path) in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
