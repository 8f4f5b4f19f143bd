"""The command line: its help, its exit codes, and errors of one line."""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from fracture.cli import COMMANDS, main
from fracture.lock import holder
from fracture.storage import storage_path
from tests.conftest import ROOT, official_paths, without_rights_to, write_shards

SCRIPTS = sorted(file.stem for file in (ROOT / "job").glob("[a-z]*.py"))
ESCAPES = {ord(character): ascii(character)[1:-1] for character in "±·≤│×"}  # for a command line in ASCII
HEAVY = {"numpy", "pyarrow", "pydantic", "yaml", "ray", "tensorflow", "sklearn", "matplotlib"}


def run_script(name: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "job" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_the_front_page_lists_every_command_with_a_line(capsys):
    assert main(["--help"]) == main([]) == 0
    first, second = capsys.readouterr().out.split("usage: ")[1:]
    assert first == second
    for name, command in COMMANDS.items():
        assert f"\n  {name:<11} {command.summary}\n" in first
        assert 20 <= len(command.summary) <= 75
    assert max(map(len, first.splitlines())) < 110


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_examples(name: str, capsys):
    assert main([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert re.search(rf"Examples:\n  fracture {name}\b", out)
    assert (f"python job/{name}.py" in out) == (name in SCRIPTS)
    assert err == ""


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_of_the_clone_runs_its_command(name: str, tmp_path: Path):
    """From another folder, with neither an installation nor a module that the script's name shadows."""
    shown = run_script(f"{name}.py", "--help", cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"usage: fracture {name} ")


def loaded_modules(*arguments: str, cwd: Path) -> str:
    """Run a command in a process of its own; return what it prints, and then the heavy modules that it loaded."""
    code = f"import sys; from fracture.cli import main; main(sys.argv[1:]); print(sorted({HEAVY} & set(sys.modules)))"
    command = [sys.executable, "-c", code, *arguments]
    environment = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=True).stdout


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["registry", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str], tmp_path: Path):
    assert loaded_modules(*arguments, cwd=tmp_path).splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", [["status", "x"], ["train", "--status", "x"]])
def test_the_status_of_a_run_is_read_without_ray_and_tensorflow(arguments: list[str], tmp_path: Path):
    (tmp_path / "runs/x").mkdir(parents=True)
    *shown, loaded = loaded_modules(*arguments, "--storage", str(tmp_path), cwd=tmp_path).splitlines()
    assert shown == [f"run        {tmp_path}/runs/x", "state      started; no job is at work on it"]
    assert not {"ray", "tensorflow", "sklearn", "matplotlib"} & set(re.findall(r"\w+", loaded))


def test_an_unknown_command_is_an_error_with_a_suggestion(capsys):
    assert main(["trian"]) == 2
    error = "error: there is no command 'trian'. Did you mean 'train'? fracture --help lists all.\n"
    assert capsys.readouterr().err == error


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert (
        capsys.readouterr().out
        == f"fracture {tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['version']}\n"
    )


def test_a_missing_dependency_is_named_with_what_to_do(tmp_path: Path):
    (tmp_path / "yaml.py").write_text("raise ModuleNotFoundError(\"No module named 'yaml'\", name='yaml')")
    command = [sys.executable, str(ROOT / "job/train.py"), "--shards", "x"]
    failed = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}, check=False)
    assert failed.returncode == 1
    assert failed.stderr == "error: yaml is not installed here. Use .venv/bin/python, which `make setup` makes.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data", "nowhere"],
            "error: --data {cwd}/nowhere: no such folder. Give the folder that holds the class folders, or train/",
        ),
        (["--shards", "nowhere"], "error: {cwd}/nowhere holds no shards: dataset.json is missing. Make them with"),
        (["--set", "training.epoch=3"], "error: unknown setting 'training.epoch' = 3. Did you mean 'training.epochs'?"),
        (
            ["--config", "quik.yaml"],
            "error: --config quik.yaml: no such file. Give a YAML file, or one of these recipes: default, external, "
            "quick, seed",
        ),
        (["--run", "a/b"], "error: --run 'a/b': a run's name is letters, digits"),
        (["--run", "../elsewhere"], "error: --run '../elsewhere': a run's name is letters, digits"),
        (["--run", ".."], "error: --run '..': a run's name is letters, digits"),
        (["--run", "/etc/x"], "error: --run '/etc/x': a run's name is letters, digits"),
        (["--run", "x\n"], "error: --run 'x\\n': a run's name is letters, digits"),
        (["--run", ""], "error: --run '': a run's name is letters, digits"),
        (["--status", "a/b"], "error: --status 'a/b': a run's name is letters, digits"),
        (["--status", "x"], "error: there is no run 'x' in {cwd}/runs. There are none; check --storage."),
        (["--workers", "0"], "argument --workers: '0' is no number of workers, such as 2, nor the fewest and the most"),
        (["--workers", "0:2"], "argument --workers: '0:2' is no number of workers"),
        (["--set", "compute.workers=0"], "error: setting 'compute.workers' = 0 is not possible"),
        (["--folds", "x"], "argument --folds: 'x' is neither a number of folds, such as 5, nor: source"),
        (["--dta", "x"], "error: there is no --dta here. Did you mean --data?"),
        (
            ["--data", "a", "--set", "model.name=resnet50", "--set", "transfer.weights=no.h5"],
            "error: transfer.weights = 'no.h5': there is no such file, or it does not end in .h5. Name",
        ),
        (["--data", "a", "--shards", "b"], "not allowed with argument"),
        (["--labels", "a.csv", "--shards", "b"], "error: --labels belongs to --data DIR: name the folder"),
        (["--data", ""], "error: --data is empty: name a folder, or leave the flag out"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments, "--storage", str(tmp_path)]) == 2
    assert message.format(cwd=tmp_path) in capsys.readouterr().err
    assert not any(tmp_path.iterdir()), "nothing is left behind"


LONG = "a" * 300  # no file system takes such a name


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--run", LONG], 2, "error: {cwd}/runs/" + LONG + "/lock/"),
        (["--data", LONG], 2, "error: {cwd}/" + LONG + " cannot be read: [Errno 36]"),
        (["--shards", LONG], 2, "error: {cwd}/" + LONG + "/dataset.json cannot be read: [Errno 36]"),
        (["--storage", LONG], 2, "error: {cwd}/" + LONG + "/runs/x/bundle/bundle.json cannot be read: [Errno 36]"),
        (["--config", LONG], 1, f"stopped: [Errno 36] File name too long: '{LONG}'. Check the path, its permissions"),
        (["--storage", "s3://"], 2, "error: s3:// names no bucket. Use s3://BUCKET/FOLDER."),
    ],
)
def test_a_path_that_cannot_be_is_one_line(
    tmp_path: Path, arguments: list[str], code: int, message: str, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    named = ["--data", "data"] if not {"--data", "--shards"} & {*arguments} else []
    run = ["--run", "x"] if "--run" not in arguments else []
    assert main(["train", *arguments, *named, *run]) == code
    error = capsys.readouterr().err
    assert error.startswith(message.format(cwd=tmp_path))
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ("bundle.json", ["export", "--to", "onnx", "--bundle", "."]),
        ("dataset.json", ["train", "--run", "y", "--shards", "."]),
        ("runs/x/status.json", ["status", "x"]),
    ],
)
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, file: str, arguments: list[str], monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / file).write_text("{}")
    (tmp_path / "runs").chmod(0o777)  # for the lock of the run
    with without_rights_to(tmp_path / file):
        assert main(arguments) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(
        rf"stopped: \[Errno 13\] .*{tmp_path}/{file}.*Permission denied. Check the path, its permissions and the .*\n",
        error,
    )


def test_the_trace_of_an_error_of_the_disk_is_shown_when_asked(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", LONG, "-v"]) == 1
    trace, _, line = capsys.readouterr().err.rpartition("stopped: ")
    assert trace.startswith("Traceback")
    assert line.startswith(f"[Errno 36] File name too long: '{LONG}'")


def test_a_process_ends_with_the_exit_code_of_its_command(tmp_path: Path):
    for command in (["job/train.py"], ["-m", "fracture.cli", "train"]):
        words = [sys.executable, *command, "--shards", "nowhere", "--storage", str(tmp_path)]
        failed = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
        assert failed.returncode == 2
        assert failed.stderr.startswith("error: ")
        assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["seed", "seed.yaml", "job/configs/seed.yaml", "fracture/configs/seed.yaml"])
def test_a_packaged_recipe_is_found_by_its_name(name: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", name, "--shards", "nowhere", "--storage", str(tmp_path)]) == 2
    assert "holds no shards" in capsys.readouterr().err


def test_settings_without_effect_are_named(tmp_path: Path, capsys):
    settings = ["--set", "model.name=mobilenetv2", "--set", "training.epochs=3", "--set", "augment.zoom=0"]
    main(["train", "--shards", "nowhere", *settings, "--storage", str(tmp_path)])
    message = "no effect  augment.zoom, training.epochs: mobilenetv2 does not use it with these settings\n"
    assert capsys.readouterr().out == message


@pytest.mark.parametrize(
    ("contenders", "arguments", "message"),
    [
        ("a: {training: {epoch: 3}}", [], "error: contender 'a': unknown setting 'training.epoch' = 3. Did you mean"),
        (
            "a: {training: {epochs: 3}}",
            ["--set", "training.epochs=1"],
            "error: contender 'a': training.epochs=1 is set for all contenders, but this one sets its own "
            "training.epochs: it would not",
        ),
        (
            "a: {model: {name: cnn}}",
            ["--set", "model={dropout: 0.1}"],
            "error: contender 'a': model={dropout: 0.1} is set for all contenders, but this one sets its own model: it",
        ),
        ("a: {}", ["--only", "b"], "error: --only 'b': there is no such contender. There are: 'a'."),
        ("a: {}", ["--run", "a/b"], "error: --run 'a/b': a run's name is letters, digits"),
        (
            "a: {}",
            ["--run", "trained"],
            "/runs/trained is a run of fracture train, not a comparison. Give another --run",
        ),
        (
            "a: {}",
            ["--shards", "shards"],
            "shards has no folds to compare on: make 5, here or with fracture preprocess, by --folds 5",
        ),
        (
            "a: {training: {batch_size: 8}}\nb: {training: {batch_size: 99}}",
            ["--shards", "folds"],
            "error: contender 'b': training.batch_size = 99 is more than the 12 training images. Use a smaller one.",
        ),
        (
            "a: {}\nb: {model: {filters: [4, 4, 4, 4, 4, 4]}}",
            ["--shards", "folds"],
            "error: contender 'b': the shards' images have 32 pixels: model.filters: 6 poolings need data.image_size",
        ),
    ],
)
def test_a_comparison_that_cannot_be_made_fails_before_anything_is_trained(
    tmp_path: Path, contenders: str, arguments: list[str], message: str, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.yaml").write_text(contenders)
    (tmp_path / "runs/trained").mkdir(parents=True)
    (tmp_path / "runs/trained/run.json").write_text("{}")
    write_shards(storage_path(tmp_path / "shards"), {"train": 40, "val": 16, "test": 16})
    write_shards(storage_path(tmp_path / "folds"), {"fold-1": 12, "fold-2": 12, "fold-3": 12})
    assert main(["compare", "--models", "models.yaml", "--storage", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["trained"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --bundle --registry is required"),
        (["--bundle", "b", "--registry", "r"], "not allowed with argument"),
        (["--bundle", "b"], "error: {cwd}/b is no bundle: bundle.json is missing. A finished run has one, in RUN/"),
        (["--registry", "r"], "error: {cwd}/r has no champion yet. Train one with: fracture retrain"),
    ],
)
def test_a_prediction_names_one_model_that_is_there(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", *arguments, "--data", "d", "--out", "x.csv"]) == 2
    assert message.format(cwd=tmp_path) in capsys.readouterr().err
    assert not any(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    ("lock", "lost"),
    [("runs/x/lock", "run 'x'"), ("locks/sample-99999-0", "the sample {cwd}/data/sample-99999-0"), ("runs/x/lock", "")],
    ids=["run taken over", "sample taken over", "SIGTERM"],
)
def test_a_job_that_loses_its_run_or_is_stopped_says_so_and_leaves_no_lock(tmp_path: Path, lock: str, lost: str):
    flags = ["--storage", str(tmp_path), "--run", "x", "--set", "sample.images=99999"]
    command = [sys.executable, "job/train.py", *flags]
    drawing = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while holder(storage_path(tmp_path / lock)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if lost:
        for claim in (tmp_path / lock).iterdir():
            claim.unlink()
    else:
        drawing.send_signal(signal.SIGTERM)
    _, error = drawing.communicate(timeout=60)
    assert drawing.returncode == 1
    if lost:
        assert f"stopped: another job took over {lost.format(cwd=tmp_path)}: " in error
    else:
        assert "stopped by Ctrl-C or SIGTERM; every finished epoch is kept. Go on with: the same command with" in error
    assert error.count("\n") <= 2
    assert {path.name for path in tmp_path.iterdir()} <= {"data"}, "no lock is left"


def test_preprocess_needs_somewhere_to_write(image_folder, capsys):
    assert main(["preprocess", "--data", str(image_folder(*official_paths(1)))]) == 2
    message = "error: --out is missing: name the folder to write the shards to, or use --audit-only"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["audit"], ["preprocess", "--audit-only"]])
def test_an_audit_is_not_written_into_the_data(command: list[str], image_folder, monkeypatch, capsys):
    folder = image_folder(*official_paths(1))
    monkeypatch.chdir(folder)
    assert main([*command, "--data", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "audits/data: may not be inside the data folder, which is never written to, or around it" in error
    assert {path.name for path in folder.iterdir()} == {"train", "val", "test"}


def test_preprocess_needs_data(capsys):
    assert main(["preprocess"]) == 2
    assert "the following arguments are required: --data" in capsys.readouterr().err


def test_evaluate_needs_a_bundle(tmp_path: Path, capsys):
    out = str(tmp_path / "out")
    assert main(["evaluate", "--bundle", str(tmp_path), "--shards", str(tmp_path), "--out", out]) == 2
    assert "is no bundle: bundle.json is missing. A finished run has one, in RUN/bundle." in capsys.readouterr().err


@pytest.mark.parametrize("action", [["list"], ["show"], ["promote", "1"], ["rollback"], ["prune"]])
def test_a_registry_without_a_version_is_an_error(action: list[str], tmp_path: Path, capsys):
    assert main(["registry", *action, "--registry", str(tmp_path)]) == 2
    message = "is not a registry with a version in it. Make one with: fracture retrain --data DIR --registry"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("encoding", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_output_that_takes_ascii_alone_gets_question_marks(encoding: dict[str, str], tmp_path: Path):
    code = (
        "from fracture.cli import main; main(['status', 'x', '--storage', 'Röntgen']); "
        "from fracture.progress.console import Console; Console().show_line('0.9 ± 0.1 · ≤ │ R\\udcf6ntgen'); "
        "from fracture.runtime.quiet import silence_native_stderr; import sys; "
        "silence_native_stderr().__enter__(); print('2 × 3', file=sys.stderr)"
    )
    command = [sys.executable, "-X", "utf8=0", "-c", code.replace("ö", "\\xf6").translate(ESCAPES)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | encoding
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert done.stdout == "0.9 ? 0.1 ? ? ? R?ntgen\n"
    assert done.stderr == (
        f"error: there is no run 'x' in {tmp_path}/R?ntgen/runs. There are none; check --storage.\n2 ? 3\n"
    )


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["status", "x"]])
@pytest.mark.parametrize("errors_too", [False, True])
def test_a_reader_that_has_gone_is_no_error(arguments: list[str], errors_too: bool, tmp_path: Path):
    """As with `| head` and `2>&1 | head`."""
    (tmp_path / "runs/x").mkdir(parents=True)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fracture.cli", *arguments]
    errors = writer if errors_too else subprocess.PIPE
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=writer, stderr=errors, cwd=tmp_path, env=environment, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, None if errors_too else b"")


def test_output_that_is_closed_is_no_error(tmp_path: Path):
    command = f"{sys.executable} -m fracture.cli --version >&- 2>&-"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=False).returncode == 0


def test_a_batch_larger_than_the_data_is_refused_before_the_data_is_scanned(image_folder, tmp_path: Path, capsys):
    folder, storage = image_folder(*official_paths(2)), str(tmp_path / "storage")
    for command in (["train"], ["tune"], ["compare"], ["retrain", "--registry", storage]):
        named = [] if command[0] == "retrain" else ["--storage", storage]
        assert main([*command, *named, "--data", str(folder), "--set", "training.batch_size=13"]) == 2
        error = "error: training.batch_size = 13 is more than the 12 images. Use a smaller one.\n"
        assert capsys.readouterr().err == error
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.ray
def test_more_workers_than_there_is_room_for_are_refused_before_the_data_is_scanned(image_folder, tmp_path: Path):
    folder = image_folder(*official_paths(1))
    wide = ["--set", "compute.cpus_per_worker=999", "--set", "training.batch_size=2"]
    refused = run_script("train.py", "--data", str(folder), *wide, "--storage", str(tmp_path / "storage"))
    assert refused.returncode == 2
    assert "error: 2 workers of 999 CPU each do not fit: the cluster's nodes have" in refused.stderr
    assert not (tmp_path / "storage").exists()
