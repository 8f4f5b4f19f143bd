"""What a Ray is given for its workers, and how many workers fit."""

import os
import re
import socket
import subprocess
import sys

import pytest

from fracture.errors import RunError, UsageError
from fracture.runtime.cluster import check_capacity, is_on_cluster, probe_cluster, runtime_environment
from tests.conftest import ROOT, shell

VARIABLES = {"TF_CPP_MIN_LOG_LEVEL": "3"}


@pytest.mark.parametrize(
    ("submitted", "joining", "others"),
    [
        pytest.param(False, False, {}, id="a Ray on this machine"),
        pytest.param(
            False, True, {"py_modules": [str(ROOT / "fracture")], "excludes": ["__pycache__"]}, id="RAY_ADDRESS"
        ),
        pytest.param(True, False, {}, id="ray job submit"),
        pytest.param(True, True, {}, id="ray job submit, which sets RAY_ADDRESS"),
    ],
)
def test_workers_find_the_package_and_no_more_than_it_is_sent(submitted: bool, joining: bool, others: dict):
    environment = runtime_environment(VARIABLES, submitted, joining)
    local = {} if submitted or joining else {"PYTHONPATH": str(ROOT)}
    assert environment == {"env_vars": VARIABLES | local, **others}


def test_the_package_that_is_sent_holds_its_templates_and_recipes():
    package = ROOT / "fracture"
    assert (package / "templates/report.html").is_file()
    assert (package / "configs/default.yaml").is_file()


def test_a_ray_that_does_not_start_is_explained(tmp_path):
    """In a process of its own, since Ray is started once a process."""
    too_long = {"RAY_TMPDIR": str(tmp_path / ("x" * 120))}  # for the name of a socket
    code = "from fracture.runtime.cluster import start_ray; start_ray(verbose=False)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | too_long, capture_output=True, text=True, check=False)
    *_, message = done.stderr.splitlines()
    assert re.match(
        r"fracture.errors.RunError: Ray cannot start on this machine: the path of .*/ray is \d+ bytes too long for its "
        r"sockets. Name a folder of yours with a short path: RAY_TMPDIR=/tmp/NAME",
        message,
    )


def test_a_cluster_that_does_not_answer_is_an_error_at_once():
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        code = "from fracture.runtime.cluster import start_ray; start_ray(verbose=False)"
        environment = os.environ | {"RAY_ADDRESS": address}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
    *_, message = done.stderr.splitlines()
    assert re.match(
        rf"fracture.errors.RunError: no Ray cluster can be joined at RAY_ADDRESS={address}: .*refused. Start that "
        "cluster, give its token in RAY_AUTH_TOKEN, or unset RAY_ADDRESS to run on this machine. It is HOST:6379, or",
        message,
    )


def test_a_port_at_which_no_ray_answers_is_an_error_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RunError, match=r"^no answer in 1 s$"):
            probe_cluster(address, seconds=1)


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "[::1]:99999", "no.such.host.invalid:6379", "x..y:6379"])
def test_an_address_that_cannot_be_is_an_error_at_once(address: str):
    with pytest.raises(OSError, match=r"."):
        probe_cluster(address)


@pytest.mark.parametrize(("address", "joins"), [("", False), ("local", False), ("auto", True), ("h:6379", True)])
def test_an_address_of_no_cluster_is_a_ray_of_ones_own(address: str, joins: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert is_on_cluster() == joins


@pytest.mark.ray
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"TF_USE_LEGACY_KERAS": "1", "KERAS_BACKEND": "torch"}, id="variables"),
        pytest.param({"KERAS_HOME": "."}, id="keras.json"),
    ],
)
def test_ray_and_its_trainer_start_side_by_side_whatever_keras_the_user_has_set(settings: dict[str, str], tmp_path):
    """Ray's processes would die with the thread that started them, were it not the main one."""
    tmp_path.joinpath("keras.json").write_text('{"backend": "torch", "floatx": "float16"}')
    code = (
        "from fracture.runtime.cluster import start_ray; start_ray(False, to_train=True); "
        "import ray, os; backend = ray.get(ray.remote(os.getenv).remote('KERAS_BACKEND')); "
        "import ray.train.tensorflow; from fracture.models import keras; "
        "print(backend, keras.backend.backend(), keras.config.floatx())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=shell() | settings, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("tensorflow tensorflow float32\n", "")


def test_more_workers_than_the_cluster_holds_is_refused_at_once(ray_cluster, tiny_config):
    with pytest.raises(
        UsageError,
        match=r"5 workers of 1 CPU each do not fit: the cluster's nodes have 4 CPU. Use --workers 4 or f",
    ):
        check_capacity(tiny_config("compute.workers=5").compute)
    with pytest.raises(UsageError, match=r"2 workers of 1 CPU and 1 GPU each .* 4 CPU and 0 GPU. Ask for less, or add"):
        check_capacity(tiny_config("compute.gpu=true").compute)
    with pytest.raises(
        UsageError, match=r"^1 worker of 1 CPU and 1 GPU does not fit: the cluster's nodes have 4 CPU and 0"
    ):
        check_capacity(tiny_config("compute.workers=1", "compute.gpu=true").compute)
    check_capacity(tiny_config("compute.workers=4").compute)
    check_capacity(tiny_config("compute.workers=8", "compute.min_workers=4").compute)
    with pytest.raises(UsageError, match=r"5 workers of 1 CPU each do not fit"):
        check_capacity(tiny_config("compute.workers=8", "compute.min_workers=5").compute)
