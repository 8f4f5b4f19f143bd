"""What starts a retraining again and again: each program for real, what it drives where this machine has it.

Kubernetes and clouds are not here. In place of Kubernetes' API is a server that answers as it does; in place of `ray
up` and `ray down`, scripts that write down that they were called. Ray is real, and so are systemd's readers of units.
"""

import asyncio
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.schedules import local, own_cluster, submit
from fracture.errors import UsageError
from tests.cluster import cron
from tests.cluster.hosts import wait_until

ROOT = Path(__file__).resolve().parents[2]
SCHEDULES = ROOT / "cluster/schedules"


# One machine: systemd and cron.

# In place of job/retrain.py: writes down what it was asked. If there is a `gate`, it ends once somebody writes to it.
RETRAIN = """
import json, pathlib, sys
here = pathlib.Path(__file__).parent
with (here / "asked").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
print("retrained")
if (here / "gate").exists():
    (here / "gate").read_bytes()
"""


DATA = 'it\'s 50% of "all"'


@dataclass(frozen=True)
class House:
    """A copy of what `make schedule` runs, in a folder whose name is awkward for shell, cron and systemd."""

    root: Path

    def schedule(self, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(self.root / "cluster/schedules/local.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    @property
    def crontab(self) -> str:
        return (self.root / "schedule/crontab").read_text()

    def asked(self) -> list[list[str]]:
        file = self.root / "job/asked"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def house(tmp_path: Path) -> House:
    root = tmp_path / "100% of $HOME & more"
    for file in ("cluster/schedules/local.py", "fracture/errors.py"):
        (root / file).parent.mkdir(parents=True)
        shutil.copy(ROOT / file, root / file)
    (root / ".venv/bin").mkdir(parents=True)
    (root / ".venv/bin/python").symlink_to(sys.executable)
    (root / "job").mkdir()
    (root / "job/retrain.py").write_text(RETRAIN)
    (root / DATA).mkdir()
    return House(root)


def wanted(house: House, every: str) -> list[str]:
    return ["--data", str(house.root / DATA), "--registry", "s3://bucket/100%25", "--every", every]


@pytest.fixture
def each_minute(house: House) -> House:
    house.schedule(*wanted(house, "minute"))
    return house


def test_the_crontab_line_runs_at_each_of_its_turns(each_minute: House):
    clock = [datetime(2026, 11, 24, 3, 16, 40)]

    def wait(seconds: float) -> None:
        clock.append(clock[-1] + timedelta(seconds=seconds))

    cron.drive(each_minute.crontab, 2, lambda: clock[-1], wait)
    assert clock[1:] == [datetime(2026, 11, 24, 3, 17), datetime(2026, 11, 24, 3, 18)]
    assert each_minute.asked() == [wanted(each_minute, "minute")] * 2
    assert (each_minute.root / "schedule/retrain.log").read_text() == "retrained\n" * 2


@pytest.mark.long
def test_the_crontab_line_runs_at_two_minutes_of_the_day(each_minute: House):
    first, second = cron.drive(each_minute.crontab, 2, datetime.now, time.sleep)
    assert timedelta(seconds=59) < second - first < timedelta(seconds=61)
    assert max(first.second, second.second) == 0
    assert each_minute.asked() == [wanted(each_minute, "minute")] * 2


def test_a_start_while_the_last_one_is_at_work_leaves_at_once(each_minute: House):
    gate = each_minute.root / "job/gate"
    os.mkfifo(gate)
    first = cron.start(each_minute.crontab)
    wait_until(20, lambda: len(each_minute.asked()) == 1, "the first retraining is at work")
    assert [cron.start(each_minute.crontab).wait(timeout=20) for _ in range(2)] == [1, 1]
    assert first.poll() is None
    gate.write_bytes(b"")
    assert first.wait(timeout=20) == 0
    gate.unlink()
    assert cron.start(each_minute.crontab).wait(timeout=20) == 0
    assert len(each_minute.asked()) == 2


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="this machine has no systemd")
@pytest.mark.parametrize("every", local.TURNS)
def test_systemd_and_cron_begin_at_the_same_moments(every: str):
    base = datetime(2026, 11, 24, 12, 30, 30)
    command = [
        "systemd-analyze",
        "calendar",
        "--iterations=3",
        f"--base-time={base} UTC",
        local.TURNS[every].on_calendar,
    ]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"TZ": "UTC"}).stdout
    moments = [datetime.fromisoformat(found) for found in re.findall(r": \w{3} ([-\d]{10} [:\d]{8}) UTC", told)]
    assert len(moments) == 3
    minutes = int((moments[-1] - base).total_seconds()) // 60 + 1
    passed = (base.replace(second=0) + timedelta(minutes=n) for n in range(1, minutes + 1))
    assert [moment for moment in passed if cron.due(f"{local.TURNS[every].cron} command", moment)] == moments


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="this machine has no systemd")
def test_systemd_finds_no_fault_in_the_units(house: House):
    house.schedule(*wanted(house, "week"))
    units = [str(house.root / f"schedule/fracture-retrain.{kind}") for kind in ("service", "timer")]
    told = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )
    assert (told.returncode, told.stderr) == (0, "")
    (house.root / ".venv/bin/python").unlink()  # it does look at what is to be run
    told = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )
    assert f"Command {house.root}/.venv/bin/python is not executable" in told.stderr


SYSTEMD = Path("/usr/lib/systemd/systemd")


@pytest.mark.skipif(not SYSTEMD.exists(), reason="this machine has no systemd")
def test_systemd_understands_the_service_as_it_was_meant(house: House):
    """`--test` prints what it has read and starts nothing. As a user, it will not be root."""
    house.schedule(*wanted(house, "week"))
    with tempfile.TemporaryDirectory() as folder:
        for unit in (house.root / "schedule").glob("fracture-retrain.*"):
            shutil.copy(unit, folder)
        user = []
        if os.geteuid() == 0:
            user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
            os.chown(folder, 65534, 65534)
        environment = {"HOME": folder, "XDG_RUNTIME_DIR": folder, "SYSTEMD_UNIT_PATH": f"{folder}:"}
        command = [*user, str(SYSTEMD), "--test", "--user", "--log-target=console", "--unit=fracture-retrain.service"]
        told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    text = told.stdout + told.stderr
    if "Unit fracture-retrain.service:" not in text:
        pytest.skip(f"systemd does not tell here what it reads: {text[-300:]}")
    read = text.partition("Unit fracture-retrain.service:")[2].partition("-> Unit ")[0]
    (command_line,) = re.findall(r"ExecStart:\n\s+Command Line: (.*)", read)
    program = [str(house.root / name) for name in (".venv/bin/python", "job/retrain.py")]
    words = ["sh", "-c", f"printf '%s\\n' {command_line}"]  # quoted as for a shell
    assert subprocess.check_output(words, text=True).splitlines() == [*program, *wanted(house, "week")]
    meant = ("Type: oneshot", "Restart: on-failure", "KillMode: mixed", "TimeoutStartSec: infinity")
    assert [line for line in meant if line not in read] == []


def test_the_service_takes_10_for_an_answer_and_retries_1_twice():
    unit = local.service(["/bin/true"], "week").splitlines()
    assert {"SuccessExitStatus=10", "Restart=on-failure", "RestartPreventExitStatus=2 10", "StartLimitBurst=3"} <= {
        *unit
    }
    assert "StartLimitIntervalSec=302400" in unit  # so the next week's three are its own


def test_the_timer_makes_up_for_a_start_that_was_missed():
    assert "Persistent=true" in local.timer("week").splitlines()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"data": ""}, r"DATA is not given: make schedule DATA=/path/to/radiographs REGISTRY=/path/to/registry"),
        ({"registry": ""}, r"REGISTRY is not given: make schedule DATA="),
        ({"data": "/no/such"}, r"DATA is a folder or a URI, and '/no/such' is neither: give the folder"),
        ({"every": "fortnight"}, r"EVERY is one of minute, .*, month, not 'fortnight': give EVERY=week"),
        ({"workers": "two"}, r"WORKERS is a number such as 2, or MIN:MAX, not 'two': give WORKERS so"),
        ({"config": "sed"}, r"CONFIG is a file, or a name in fracture/configs, not 'sed': give CONFIG=seed, or a path"),
        ({"notify": "me"}, r"NOTIFY is a URL such as https://example.org/hook, not 'me'"),
        ({"registry": "a\nb"}, r"neither systemd nor cron takes a line break or backslash, as in '.*a\\nb': rename"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_mistake_is_told_in_one_line(given: dict[str, str], told: str):
    right = {"data": "s3://b/d", "registry": "s3://b/r", "every": "week", "config": "", "workers": "", "notify": ""}
    with pytest.raises(UsageError, match=told) as caught:
        local.command(**right | given)
    assert "\n" not in str(caught.value)


def test_a_mistake_leaves_with_2_and_writes_nothing(tmp_path: Path):
    command = [sys.executable, str(SCHEDULES / "local.py"), "--data", "s3://b/d", "--into", str(tmp_path / "schedule")]
    left = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (left.returncode, left.stdout) == (2, "")
    assert left.stderr.startswith("error: REGISTRY is not given")
    assert not (tmp_path / "schedule").exists()


def test_what_is_given_reaches_the_command(tmp_path: Path):
    (tmp_path / "own.yaml").write_text("")
    given = (str(tmp_path), "registry", "day", str(tmp_path / "own.yaml"), "1:2", "https://example.org/hook")
    assert local.command(*given)[2:] == [
        *("--data", str(tmp_path), "--registry", str(Path.cwd() / "registry"), "--every", "day", "--workers", "1:2"),
        *("--config", str(tmp_path / "own.yaml"), "--notify", "https://example.org/hook"),
    ]
    assert local.command("gs://b/d", "gs://b/r", "week", "seed", "", "")[-2:] == ["--config", "seed"]


# Kubernetes: the pod that creates a RayJob with a cluster of its own.

TEMPLATE = "kind: RayJob\nmetadata: {}\nspec: {entrypoint: retrain --tick TICK}\n"


@dataclass
class RayJobs:
    """Kubernetes' API of RayJobs, and how each that is created will end."""

    ends: list[dict[str, str]]
    created: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        base, _, name = path.partition("/namespaces/of-the-tests/rayjobs")
        assert base == "/apis/ray.io/v1"
        self.asked.append(method)
        if method == "GET":
            found = self.created.get(name.lstrip("/"))
            return (200, found) if found else (404, {"reason": "NotFound"})
        job = json.loads(body)
        if job["metadata"]["name"] in self.created:
            return 409, {"reason": "AlreadyExists"}
        if not self.ends:
            return 403, {"reason": "Forbidden"}
        self.created[job["metadata"]["name"]] = job | {"status": self.ends.pop(0)}
        return 201, job


@contextmanager
def kubernetes(tmp_path: Path, *ends: dict[str, str]) -> Iterator[RayJobs]:
    jobs = RayJobs([*ends])

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            assert self.headers["Authorization"] == "Bearer TOKEN"
            status, content = jobs.answer(
                self.command, self.path, self.rfile.read(int(self.headers["Content-Length"] or 0))
            )
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        do_GET = do_POST = _answer

        def log_message(self, *arguments: object) -> None:
            pass

    (tmp_path / "namespace").write_text("of-the-tests")
    (tmp_path / "token").write_text("TOKEN\n")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        jobs.url = f"http://127.0.0.1:{server.server_port}"
        yield jobs
        server.shutdown()


def ended(code: int) -> dict[str, str]:
    """As KubeRay has it; its message is the one of Ray's job supervisor."""
    if code == 0:
        return {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "message": "Job finished successfully."}
    message = f"Job entrypoint command failed with exit code {code}, last available logs (truncated to 20,000 chars):\n"
    return {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": message}


def create(jobs: RayJobs, tmp_path: Path) -> int:
    return own_cluster.main(own_cluster.Kubernetes(jobs.url, tmp_path), TEMPLATE, "week-1", "UID", every=0)


@pytest.mark.parametrize("code", [0, 10, 2, 1])
def test_the_pod_leaves_with_the_exit_code_of_the_training(code: int, tmp_path: Path):
    with kubernetes(tmp_path, ended(code)) as jobs:
        assert create(jobs, tmp_path) == code
    (job,) = jobs.created.values()
    assert job["spec"] == {"entrypoint": "retrain --tick week-1"}
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "week-1", "uid": "UID"}
    assert job["metadata"] == {"name": "week-1-1", "ownerReferences": [owner]}


def test_a_rayjob_that_is_there_is_not_created_again(tmp_path: Path):
    """Not after an answer; after a failure there is another one, of the same tick."""
    with kubernetes(tmp_path, ended(1), ended(10)) as jobs:
        assert [create(jobs, tmp_path) for _ in range(4)] == [1, 10, 10, 10]
    assert [*jobs.created] == ["week-1-1", "week-1-2"]
    assert {job["spec"]["entrypoint"] for job in jobs.created.values()} == {"retrain --tick week-1"}


def test_the_pod_waits_for_the_end(tmp_path: Path):
    """So that `concurrencyPolicy: Forbid` knows that a retraining is at work; also one that another pod created."""
    with kubernetes(tmp_path, {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}) as jobs:
        for _ in range(2):
            looked = len(jobs.asked)
            left: list[int] = []
            waiting = threading.Thread(target=lambda left=left: left.append(create(jobs, tmp_path)))
            waiting.start()
            wait_until(20, lambda looked=looked: jobs.asked[looked:].count("GET") > 3, "the pod looks again")
            assert left == []
            jobs.created["week-1-1"]["status"] = ended(0)
            waiting.join(20)
            assert left == [0]
            jobs.created["week-1-1"]["status"] = {"jobDeploymentStatus": "Running"}
    assert [*jobs.created] == ["week-1-1"]


def test_what_kubernetes_does_not_allow_is_told(tmp_path: Path, capsys: pytest.CaptureFixture):
    with kubernetes(tmp_path) as jobs:
        assert create(jobs, tmp_path) == 1
    assert "Kubernetes does not create week-1-1: 403" in capsys.readouterr().err


def test_the_pod_runs_the_program_with_these_flags_and_leaves_on_sigterm(tmp_path: Path):
    """The RayJob goes on; the next pod finds it."""
    (tmp_path / "rayjob.yaml").write_text(TEMPLATE)
    with kubernetes(tmp_path, {"jobDeploymentStatus": "Running"}) as jobs:
        flags = [f"--template={tmp_path}/rayjob.yaml", "--tick=week-1", "--owner=UID", f"--api={jobs.url}"]
        command = [sys.executable, str(SCHEDULES / "own_cluster.py"), *flags, f"--account={tmp_path}", "--every=0.1"]
        with subprocess.Popen(command) as process:
            wait_until(20, lambda: "GET" in jobs.asked, "the pod waits")
            process.terminate()
        assert process.returncode == 143
    assert {*jobs.asked} == {"POST", "GET"}


# A cloud: up, submit, down.

RAY = """#!/bin/bash
echo "ray $*" >> "$CALLS"
case $1 in
  up) [ -z "${HOLD_UP:-}" ] || tail -f /dev/null & wait $!; exit "${UP:-0}" ;;
  dashboard) echo $$ > "$CALLS.dashboard"; exec tail -f /dev/null ;;
  down) [ "$(grep -c '^ray down' "$CALLS")" -gt "${DOWN_FAILS:-0}" ] ;;
esac
"""
# Of cloud.sh's two uses of Python, the one that submits.
PYTHON = """#!/bin/bash
[ "$1" = -c ] && exec "$REAL_PYTHON" "$@"
until [ -s "$CALLS.dashboard" ]; do sleep 0.01; done
echo "submit ${*:2}" | sed 's/127.0.0.1:[0-9]*/HEAD/' >> "$CALLS"
[ -z "${HOLD_JOB:-}" ] || { trap 'echo "job saved" >> "$CALLS"; exit 143' TERM; tail -f /dev/null & wait $!; }
exit "${JOB:-0}"
"""
UP = "ray up -y --cluster-name fracture-retrain FILE"
DOWN = "ray down -y --cluster-name fracture-retrain FILE"
SUBMIT = "submit --address http://HEAD --submission-id w48 -- python /app/job/retrain.py --data s3://b/d --tick w48"


@dataclass(frozen=True)
class Cloud:
    folder: Path
    arguments: tuple[str, ...] = ("--data", "s3://b/d", "--tick", "w48")

    def begin(self, **how: object) -> subprocess.Popen:
        environment = {
            "PATH": f"{self.folder}:/usr/bin:/bin",
            "CALLS": str(self.folder / "calls"),
            "RAY_DOWN_WAIT": "0",
        }
        environment |= {"REAL_PYTHON": sys.executable} | {name: str(value) for name, value in how.items()}
        command = [str(SCHEDULES / "cloud.sh"), str(self.folder / "cluster.yaml"), *self.arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # Where these tests run in a shell's background, they have SIGINT ignored, and so would the script.
        heeds = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
        return subprocess.Popen(command, env=environment, preexec_fn=heeds, **pipes)

    def run(self, **how: object) -> tuple[int, str]:
        process = self.begin(**how)
        _, told = process.communicate(timeout=60)
        return process.returncode, told

    @property
    def calls(self) -> list[str]:
        """Without the dashboard's, which may be made more than once."""
        file = self.folder / "calls"
        text = file.read_text().replace(str(self.folder / "cluster.yaml"), "FILE") if file.exists() else ""
        return [line for line in text.splitlines() if not line.startswith("ray dashboard")]

    def dashboard_is_gone(self) -> bool:
        pid = int((self.folder / "calls.dashboard").read_text())
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        return True


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    shutil.copy(ROOT / "cluster/aws.yaml", tmp_path / "cluster.yaml")
    for name, text in {"ray": RAY, "python": PYTHON}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return Cloud(tmp_path)


@pytest.mark.parametrize("code", [0, 10, 2, 1])
def test_the_cluster_goes_and_the_exit_code_of_the_job_stays(code: int, cloud: Cloud):
    assert cloud.run(JOB=code)[0] == code
    assert cloud.calls == [UP, SUBMIT, DOWN]
    wait_until(10, cloud.dashboard_is_gone, "the way to the dashboard is closed")


def test_a_cluster_that_came_up_half_way_is_taken_down(cloud: Cloud):
    code, told = cloud.run(UP=2)
    assert code == 1  # not 2, which would say that a retry is pointless
    assert "the cluster fracture-retrain did not come up" in told
    assert cloud.calls == [UP, DOWN]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)])
def test_a_signal_lets_the_job_save_and_takes_the_cluster_down(number: signal.Signals, code: int, cloud: Cloud):
    process = cloud.begin(HOLD_JOB=1)
    wait_until(20, lambda: SUBMIT in cloud.calls, "the job is at work")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert cloud.calls == [UP, SUBMIT, "job saved", DOWN]
    wait_until(10, cloud.dashboard_is_gone, "the way to the dashboard is closed")


def test_a_signal_while_the_cluster_comes_up_takes_it_down(cloud: Cloud):
    process = cloud.begin(HOLD_UP=1)
    wait_until(20, lambda: UP in cloud.calls, "the cluster comes up")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert cloud.calls == [UP, DOWN]


def test_taking_down_is_tried_again(cloud: Cloud):
    code, told = cloud.run(DOWN_FAILS=2, JOB=10)
    assert code == 10
    assert cloud.calls == [UP, SUBMIT, DOWN, DOWN, DOWN]
    assert "NOT" not in told


def test_a_cluster_that_stays_is_told_loudly(cloud: Cloud):
    code, told = cloud.run(DOWN_FAILS=99)
    assert code == 1
    assert cloud.calls.count(DOWN) == 5
    assert "The cluster fracture-retrain of" in told
    assert "could NOT be taken down. It may still cost money." in told
    assert "run: ray down -y --cluster-name fracture-retrain" in told


def test_a_second_one_on_this_machine_leaves_the_cluster_alone(cloud: Cloud):
    first = cloud.begin(HOLD_JOB=1)
    wait_until(20, lambda: SUBMIT in cloud.calls, "the job is at work")
    assert cloud.run()[0] == 0
    assert cloud.calls == [UP, SUBMIT]
    first.terminate()
    first.communicate(timeout=60)
    assert cloud.run()[0] == 0  # the lock went with the first
    assert cloud.calls == [UP, SUBMIT, "job saved", DOWN, UP, SUBMIT, DOWN]


def test_without_a_tick_or_a_file_nothing_is_started(cloud: Cloud):
    for arguments, told in {("--data", "s3://b/d"): "none is given: give --tick 2026-w48", (): "none is given"}.items():
        process = Cloud(cloud.folder, arguments).run()
        assert process[0] == 2
        assert told in process[1]
    (cloud.folder / "cluster.yaml").unlink()
    code, told = cloud.run()
    assert code == 2
    assert "the first argument is a file for `ray up`" in told
    assert cloud.calls == []


def test_without_ray_nothing_is_started(cloud: Cloud):
    (cloud.folder / "ray").unlink()
    code, told = cloud.run()
    assert code == 2
    assert "error: ray is not on the PATH: put .venv/bin there" in told


def test_ray_has_the_commands_that_the_script_gives():
    from click.testing import CliRunner
    from ray.scripts.scripts import cli

    for command, flags in {
        "up": ("-y", "--cluster-name"),
        "down": ("-y", "--cluster-name"),
        "dashboard": ("--port",),
    }.items():
        told = CliRunner().invoke(cli, [command, "--help"]).output
        assert [flag for flag in ("--cluster-name", *flags) if flag not in told] == []


# A standing cluster: submit.py.


def submit_command(address: str, tick: str, *command: str, patience: float = 60) -> list[str]:
    flags = ["--address", address, "--submission-id", tick, "--patience", str(patience)]
    return [sys.executable, str(SCHEDULES / "submit.py"), *flags, "--", *command]


def test_a_cluster_that_does_not_answer_is_given_up():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        command = submit_command(f"http://127.0.0.1:{closed.getsockname()[1]}", "w48", "true", patience=0)
        left = subprocess.run(command, capture_output=True, text=True, check=False)
    assert left.returncode == 1
    assert "stopped: no answer for 0 s" in left.stderr


def test_a_log_that_breaks_off_goes_on_where_it_was(capsys: pytest.CaptureFixture):
    import ray.job_submission

    class Client:
        """Its connection breaks once, after the second line."""

        asked = 0

        async def tail_job_logs(self, name: str):
            self.asked += 1
            yield "one\n"
            yield "two\n" if self.asked == 1 else "two\nthree\n"
            if self.asked == 1:
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield "four\n"

        def get_job_info(self, name: str):
            status = ray.job_submission.JobStatus.RUNNING if self.asked == 1 else ray.job_submission.JobStatus.SUCCEEDED
            return ray.job_submission.JobDetails(type="SUBMISSION", entrypoint="", status=status)

    asyncio.run(submit.follow(Client(), "w48", patience=0))
    printed = capsys.readouterr()
    assert printed.out == "one\ntwo\nthree\nfour\n"
    assert "the log of w48 broke off: WebSocket connection closed" in printed.err


@dataclass(frozen=True)
class Standing:
    address: str
    folder: Path
    environment: dict[str, str]

    def begin(self, tick: str, *command: str) -> subprocess.Popen:
        return subprocess.Popen(
            submit_command(self.address, tick, *command),
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, tick: str, *command: str) -> tuple[int, str]:
        process = self.begin(tick, *command)
        told, _ = process.communicate(timeout=120)
        return process.returncode, told


@pytest.fixture(scope="module")
def standing() -> Iterator[Standing]:
    """A Ray of its own, with a token, beside whatever other Ray there is."""
    with tempfile.TemporaryDirectory(prefix="fracture-") as folder, tempfile.TemporaryFile("w+") as log:
        ports = free_ports(3)
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": f"token-of-{os.getpid()}-and-of-no-other-cluster"}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = kept | token | {"PATH": path, "RAY_JOB_STOP_WAIT_TIME_S": "60"}
        command = [
            "ray", "start", "--head", "--block", "--disable-usage-stats", "--port=0", "--num-cpus=1",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={ports[0]}", f"--dashboard-agent-listen-port={ports[1]}",
            f"--ray-client-server-port={ports[2]}", f"--object-store-memory={100 * 2**20}", f"--temp-dir={folder}",
        ]  # fmt: skip
        with subprocess.Popen(command, env=environment, stdout=log, stderr=log) as ray:
            wait_until(60, lambda: ray.poll() is not None or told(log).count("Ray runtime started"), "Ray runs")
            assert ray.poll() is None, told(log)
            yield Standing(f"http://127.0.0.1:{ports[0]}", Path(folder), environment)
            ray.terminate()


def told(log: Any) -> str:
    log.seek(0)
    return log.read()


def free_ports(count: int) -> list[int]:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in taken]
    for each in taken:
        each.close()
    return ports


@pytest.mark.long
@pytest.mark.parametrize("code", [0, 10])
def test_an_answer_is_asked_for_once(code: int, standing: Standing):
    file = standing.folder / f"answered-{code}"
    command = ("sh", "-c", f"echo 'it ran'; echo x >> {file}; exit {code}")
    first, again = (standing.run(f"answer-{code}", *command) for _ in range(2))
    assert (first[0], again[0]) == (code, code)
    assert "it ran\n" in first[1]
    assert "is over since an earlier start of this tick" in again[1]
    assert file.read_text() == "x\n"


@pytest.mark.long
def test_a_failure_is_tried_again_under_the_next_name(standing: Standing):
    """Also where the job of another tick has that name."""
    assert standing.run("2026-11-2", "true")[0] == 0
    file = standing.folder / "tries"
    script = f"echo x >> {file}; test $(wc -l < {file}) -gt 2 || exit $(wc -l < {file})"
    left = [standing.run("2026-11", "sh", "-c", script) for _ in range(4)]
    assert [code for code, _ in left] == [1, 2, 0, 0]
    assert ["following 2026-11\n" in left[0][1], "following 2026-11-3\n" in left[1][1]] == [True, True]
    assert "following 2026-11-4\n" in left[2][1]
    assert file.read_text() == "x\n" * 3


@pytest.mark.long
def test_two_starts_of_a_tick_are_one_job(standing: Standing):
    file = standing.folder / "once"
    both = [standing.begin("once", "sh", "-c", f"echo x >> {file}; sleep 5; exit 10") for _ in range(2)]
    said = [each.communicate(timeout=120)[0] for each in both]
    assert [each.returncode for each in both] == [10, 10]
    assert all("following once\n" in text for text in said)
    assert file.read_text() == "x\n"


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_job_and_waits_until_it_has_saved(number: signal.Signals, code: int, standing: Standing):
    file, tick = standing.folder / f"saved-{code}", f"stopped-{code}"
    job = f"trap 'sleep 2; echo saved >> {file}; exit 0' TERM; touch {file}; while :; do sleep 0.1; done"
    process = standing.begin(tick, "bash", "-c", job)
    wait_until(60, file.exists, "the job is at work")
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert file.read_text() == "saved\n"
    assert f"following {tick}-2\n" in standing.run(tick, "true")[1]


@pytest.mark.long
def test_a_wrong_token_is_refused(standing: Standing):
    stranger = Standing(standing.address, standing.folder, standing.environment | {"RAY_AUTH_TOKEN": "x" * 32})
    code, said = stranger.run("stranger", "touch", str(standing.folder / "stranger"))
    assert code == 1
    assert "stopped: " in said
    assert not (standing.folder / "stranger").exists()


# The way to the dashboard that `ray dashboard` makes with ssh, made without.
FORWARD = """
import asyncio, sys

async def pump(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()

async def forward(reader, writer):
    other, to_other = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
    await asyncio.gather(pump(reader, to_other), pump(other, writer))

async def main():
    async with await asyncio.start_server(forward, "127.0.0.1", int(sys.argv[2])) as server:
        await server.serve_forever()

asyncio.run(main())
"""


@pytest.mark.long
def test_the_script_for_clouds_hands_its_job_to_a_real_ray(cloud: Cloud, standing: Standing):
    """Here there is no /app/job/retrain.py, and Python says 2 to that."""
    (cloud.folder / "forward.py").write_text(FORWARD)
    (cloud.folder / "python").unlink()
    real, port = sys.executable, standing.address.rpartition(":")[2]
    dashboard = f'exec {real} {cloud.folder}/forward.py {port} "$5"'
    (cloud.folder / "ray").write_text(RAY.replace("exec tail -f /dev/null", dashboard))
    path = f"{cloud.folder}:{standing.environment['PATH']}"
    process = cloud.begin(**standing.environment | {"PATH": path})
    said, told = process.communicate(timeout=120)
    assert process.returncode == 2, said + told
    assert "can't open file '/app/job/retrain.py'" in said
    assert cloud.calls == [UP, DOWN]
    wait_until(10, cloud.dashboard_is_gone, "the way to the dashboard is closed")
