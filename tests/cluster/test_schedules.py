"""The schedules run for real, with what they call where this machine has it.

Kubernetes and clouds are not available here. Scripts that record their calls stand in for `ray up` and `ray down`.
Ray is real, and so are systemd's own parsers of units.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.schedules import local, submit
from fracture.errors import UsageError
from tests.cluster import cron
from tests.cluster.hosts import wait_until

ROOT = Path(__file__).resolve().parents[2]
SCHEDULES = ROOT / "cluster/schedules"


# One machine: systemd and cron.

# Stands in for job/retrain.py and records its arguments. If there is a fifo `gate`, it ends once somebody writes to it.
RETRAIN = """
import json, pathlib, sys
here = pathlib.Path(__file__).parent
with (here / "calls").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
print("retrained")
if (here / "gate").exists():
    (here / "gate").read_bytes()
"""


DATA = 'it\'s 50% of "all"'


@dataclass(frozen=True)
class Clone:
    """A copy of what `make schedule` runs, in a folder whose name is difficult for shell, cron and systemd."""

    root: Path

    def schedule(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        command = [sys.executable, str(self.root / "cluster/schedules/local.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=check)

    @property
    def crontab(self) -> str:
        return (self.root / "schedule/crontab").read_text()

    def calls(self) -> list[list[str]]:
        file = self.root / "job/calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    root = tmp_path / "100% of $HOME & more"
    (root / "cluster/schedules").mkdir(parents=True)
    shutil.copy(SCHEDULES / "local.py", root / "cluster/schedules")
    (root / ".venv/bin").mkdir(parents=True)
    (root / ".venv/bin/python").symlink_to(sys.executable)
    (root / "job").mkdir()
    (root / "job/retrain.py").write_text(RETRAIN)
    (root / DATA).mkdir()
    return Clone(root)


def flags(clone: Clone, every: str) -> list[str]:
    return ["--data", str(clone.root / DATA), "--registry", "s3://bucket/100%25", "--every", every]


@pytest.fixture
def each_minute(clone: Clone) -> Clone:
    clone.schedule(*flags(clone, "minute"))
    return clone


def test_the_crontab_line_runs_at_each_due_minute(each_minute: Clone):
    clock = [datetime(2026, 11, 24, 3, 16, 40)]

    def wait(seconds: float) -> None:
        clock.append(clock[-1] + timedelta(seconds=seconds))

    cron.drive(each_minute.crontab, 2, lambda: clock[-1], wait)
    assert clock[1:] == [datetime(2026, 11, 24, 3, 17), datetime(2026, 11, 24, 3, 18)]
    assert each_minute.calls() == [flags(each_minute, "minute")] * 2
    assert (each_minute.root / "schedule/retrain.log").read_text() == "retrained\n" * 2


@pytest.mark.long
def test_the_crontab_line_runs_at_two_minutes_of_the_day(each_minute: Clone):
    first, second = cron.drive(each_minute.crontab, 2, datetime.now, time.sleep)
    assert timedelta(seconds=59) < second - first < timedelta(seconds=61)
    assert max(first.second, second.second) == 0
    assert each_minute.calls() == [flags(each_minute, "minute")] * 2


def test_a_start_during_another_exits_at_once(each_minute: Clone):
    gate = each_minute.root / "job/gate"
    os.mkfifo(gate)
    first = cron.start(each_minute.crontab)
    wait_until(20, lambda: len(each_minute.calls()) == 1, "the first retraining runs")
    assert [cron.start(each_minute.crontab).wait(timeout=20) for _ in range(2)] == [1, 1]
    assert first.poll() is None
    gate.write_bytes(b"")
    assert first.wait(timeout=20) == 0
    gate.unlink()
    assert cron.start(each_minute.crontab).wait(timeout=20) == 0
    assert len(each_minute.calls()) == 2


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="this machine has no systemd")
@pytest.mark.parametrize("every", local.INTERVALS)
def test_systemd_and_cron_begin_at_the_same_moments(every: str):
    base = datetime(2026, 11, 24, 12, 30, 30)
    command = [
        "systemd-analyze",
        "calendar",
        "--iterations=3",
        f"--base-time={base} UTC",
        local.INTERVALS[every].on_calendar,
    ]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"TZ": "UTC"}).stdout
    moments = [datetime.fromisoformat(found) for found in re.findall(r": \w{3} ([-\d]{10} [:\d]{8}) UTC", output)]
    assert len(moments) == 3
    minutes = int((moments[-1] - base).total_seconds()) // 60 + 1
    passed = (base.replace(second=0) + timedelta(minutes=n) for n in range(1, minutes + 1))
    assert [moment for moment in passed if cron.is_due(f"{local.INTERVALS[every].cron} command", moment)] == moments


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="this machine has no systemd")
def test_systemd_accepts_the_units(clone: Clone):
    clone.schedule(*flags(clone, "week"))
    units = [str(clone.root / f"schedule/fracture-retrain.{kind}") for kind in ("service", "timer")]
    output = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )
    assert (output.returncode, output.stderr) == (0, "")
    (clone.root / ".venv/bin/python").unlink()  # systemd checks the program too
    output = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )
    assert f"Command {clone.root}/.venv/bin/python is not executable" in output.stderr


SYSTEMD = Path("/usr/lib/systemd/systemd")


@pytest.mark.skipif(not SYSTEMD.exists(), reason="this machine has no systemd")
def test_systemd_parses_the_service_as_intended(clone: Clone):
    """`--test` prints the parsed units and starts nothing. With `--user`, systemd refuses to run as root."""
    clone.schedule(*flags(clone, "week"))
    with tempfile.TemporaryDirectory() as folder:
        for unit in (clone.root / "schedule").glob("fracture-retrain.*"):
            shutil.copy(unit, folder)
        user = []
        if os.geteuid() == 0:
            user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
            os.chown(folder, 65534, 65534)
        environment = {"HOME": folder, "XDG_RUNTIME_DIR": folder, "SYSTEMD_UNIT_PATH": f"{folder}:"}
        command = [*user, str(SYSTEMD), "--test", "--user", "--log-target=console", "--unit=fracture-retrain.service"]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    text = output.stdout + output.stderr
    if "Unit fracture-retrain.service:" not in text:
        pytest.skip(f"systemd does not print the parsed units here: {text[-300:]}")
    read = text.partition("Unit fracture-retrain.service:")[2].partition("-> Unit ")[0]
    (command_line,) = re.findall(r"ExecStart:\n\s+Command Line: (.*)", read)
    program = [str(clone.root / name) for name in (".venv/bin/python", "job/retrain.py")]
    words = ["sh", "-c", f"printf '%s\\n' {command_line}"]  # quoted as for a shell
    assert subprocess.check_output(words, text=True).splitlines() == [*program, *flags(clone, "week")]
    meant = ("Type: oneshot", "Restart: on-failure", "KillMode: mixed", "TimeoutStartSec: infinity")
    assert [line for line in meant if line not in read] == []


def test_the_service_accepts_10_and_retries_1_twice():
    unit = local.format_service(["/bin/true"], "week").splitlines()
    assert {"SuccessExitStatus=10", "Restart=on-failure", "RestartPreventExitStatus=2 10", "StartLimitBurst=3"} <= {
        *unit
    }
    assert "StartLimitIntervalSec=302400" in unit  # so the next week's three are its own


def test_the_timer_makes_up_for_a_start_that_was_missed():
    assert "Persistent=true" in local.format_timer("week").splitlines()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": ""}, r"DATA is not given: make schedule DATA=/path/to/radiographs REGISTRY=/path/to/registry"),
        ({"registry": ""}, r"REGISTRY is not given: make schedule DATA="),
        ({"data": "/no/such"}, r"DATA is a folder or a URI, and '/no/such' is neither: give the folder"),
        ({"every": "fortnight"}, r"EVERY is one of minute, .*, month, not 'fortnight': give EVERY=week"),
        ({"workers": "two"}, r"WORKERS is a number such as 2, or MIN:MAX, not 'two': correct WORKERS"),
        ({"config": "sed"}, r"CONFIG is a file, or a name in fracture/configs, not 'sed': give CONFIG=seed, or a path"),
        ({"notify": "me"}, r"NOTIFY is a URL such as https://example.org/hook, not 'me'"),
        (
            {"registry": "a\nb"},
            r"neither systemd nor cron accepts a line break or a backslash, as in '.*a\\nb': rename",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_mistake_is_reported_in_one_line(given: dict[str, str], message: str):
    right = {"data": "s3://b/d", "registry": "s3://b/r", "every": "week", "config": "", "workers": "", "notify": ""}
    with pytest.raises(UsageError, match=message) as caught:
        local.build_command(**right | given)
    assert "\n" not in str(caught.value)


def test_a_mistake_leaves_with_2_and_writes_nothing(clone: Clone):
    done = clone.schedule("--data", "s3://b/d", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: REGISTRY is not given")
    assert not (clone.root / "schedule").exists()


def test_every_option_reaches_the_command(tmp_path: Path):
    (tmp_path / "own.yaml").write_text("")
    given = (str(tmp_path), "registry", "day", str(tmp_path / "own.yaml"), "1:2", "https://example.org/hook")
    assert local.build_command(*given)[2:] == [
        *("--data", str(tmp_path), "--registry", str(Path.cwd() / "registry"), "--every", "day", "--workers", "1:2"),
        *("--config", str(tmp_path / "own.yaml"), "--notify", "https://example.org/hook"),
    ]
    assert local.build_command("gs://b/d", "gs://b/r", "week", "seed", "", "")[-2:] == ["--config", "seed"]


# A cloud: up, submit, down.

RAY = """#!/bin/bash
echo "ray $*" >> "$CALLS"
case $1 in
  up) [ -z "${HOLD_UP:-}" ] || tail -f /dev/null & wait $!; exit "${UP:-0}" ;;
  dashboard) echo $$ > "$CALLS.dashboard"; exec tail -f /dev/null ;;
  down) [ "$(grep -c '^ray down' "$CALLS")" -gt "${DOWN_FAILS:-0}" ] ;;
esac
"""
# Replaces the one of cloud.sh's two uses of Python that submits.
PYTHON = """#!/bin/bash
[ "$1" = -c ] && exec "$REAL_PYTHON" "$@"
until [ -s "$CALLS.dashboard" ]; do sleep 0.01; done
[ -z "${HOLD_JOB:-}" ] || trap 'echo "job saved" >> "$CALLS"; exit 143' TERM # before a test sees that the job runs
echo "submit ${*:2}" | sed 's/127.0.0.1:[0-9]*/HEAD/' >> "$CALLS"
[ -z "${HOLD_JOB:-}" ] || { tail -f /dev/null & wait $!; }
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
        # A shell's background jobs ignore SIGINT, and the script would inherit that.
        restore = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
        return subprocess.Popen(command, env=environment, preexec_fn=restore, **pipes)

    def run(self, **how: object) -> tuple[int, str]:
        process = self.begin(**how)
        _, output = process.communicate(timeout=60)
        return process.returncode, output

    @property
    def calls(self) -> list[str]:
        """Recorded calls, except the dashboard's, which may be repeated."""
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
    wait_until(10, cloud.dashboard_is_gone, "the forwarding of the dashboard has ended")


def test_a_cluster_that_came_up_half_way_is_taken_down(cloud: Cloud):
    code, output = cloud.run(UP=2)
    assert code == 1  # not 2, which would say that a retry is pointless
    assert "the cluster fracture-retrain did not start" in output
    assert cloud.calls == [UP, DOWN]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)])
def test_a_signal_lets_the_job_save_and_takes_the_cluster_down(number: signal.Signals, code: int, cloud: Cloud):
    process = cloud.begin(HOLD_JOB=1)
    wait_until(20, lambda: SUBMIT in cloud.calls, "the job runs")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert cloud.calls == [UP, SUBMIT, "job saved", DOWN]
    wait_until(10, cloud.dashboard_is_gone, "the forwarding of the dashboard has ended")


def test_a_signal_while_the_cluster_comes_up_takes_it_down(cloud: Cloud):
    process = cloud.begin(HOLD_UP=1)
    wait_until(20, lambda: UP in cloud.calls, "the cluster comes up")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert cloud.calls == [UP, DOWN]


def test_taking_down_is_tried_again(cloud: Cloud):
    code, output = cloud.run(DOWN_FAILS=2, JOB=10)
    assert code == 10
    assert cloud.calls == [UP, SUBMIT, DOWN, DOWN, DOWN]
    assert "NOT" not in output


def test_a_cluster_that_cannot_be_taken_down_is_reported_loudly(cloud: Cloud):
    code, output = cloud.run(DOWN_FAILS=99)
    assert code == 1
    assert cloud.calls.count(DOWN) == 5
    assert "The cluster fracture-retrain of" in output
    assert "could NOT be taken down. It may still cost money." in output
    assert "run: ray down -y --cluster-name fracture-retrain" in output


def test_a_second_one_on_this_machine_leaves_the_cluster_alone(cloud: Cloud):
    first = cloud.begin(HOLD_JOB=1)
    wait_until(20, lambda: SUBMIT in cloud.calls, "the job runs")
    assert cloud.run()[0] == 0
    assert cloud.calls == [UP, SUBMIT]
    first.terminate()
    first.communicate(timeout=60)
    assert cloud.run()[0] == 0  # the lock went with the first
    assert cloud.calls == [UP, SUBMIT, "job saved", DOWN, UP, SUBMIT, DOWN]


def test_without_a_tick_or_a_file_nothing_is_started(cloud: Cloud):
    for arguments, output in {
        ("--data", "s3://b/d"): "none is given: give --tick 2026-w48",
        (): "none is given",
    }.items():
        process = Cloud(cloud.folder, arguments).run()
        assert process[0] == 2
        assert output in process[1]
    (cloud.folder / "cluster.yaml").unlink()
    code, output = cloud.run()
    assert code == 2
    assert "the first argument is a file for `ray up`" in output
    assert cloud.calls == []


def test_without_ray_nothing_is_started(cloud: Cloud):
    (cloud.folder / "ray").unlink()
    code, output = cloud.run()
    assert code == 2
    assert "error: ray is not on the PATH: put .venv/bin there" in output


def test_ray_has_the_commands_that_the_script_gives():
    from click.testing import CliRunner
    from ray.scripts.scripts import cli

    for command, flags in {
        "up": ("-y", "--cluster-name"),
        "down": ("-y", "--cluster-name"),
        "dashboard": ("--port",),
    }.items():
        output = CliRunner().invoke(cli, [command, "--help"]).output
        assert [flag for flag in ("--cluster-name", *flags) if flag not in output] == []


# A permanent cluster: submit.py.


def test_a_cluster_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # restored afterwards; submit.py sets it
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(
            RuntimeError, match=r"no answer for 0 s, a job may be running: Failed to connect to Ray at address"
        ):
            submit.main(address, "w48", ["true"], patience=0)


def test_a_log_is_resumed_after_a_broken_connection(capsys: pytest.CaptureFixture):
    import ray.job_submission

    class Client:
        """A connection that breaks once, after the second line."""

        calls = 0

        async def tail_job_logs(self, name: str):
            self.calls += 1
            yield "one\n"
            yield "two\n" if self.calls == 1 else "two\nthree\n"
            if self.calls == 1:
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield "four\n"

        def get_job_info(self, name: str):
            status = ray.job_submission.JobStatus.RUNNING if self.calls == 1 else ray.job_submission.JobStatus.SUCCEEDED
            return ray.job_submission.JobDetails(type="SUBMISSION", entrypoint="", status=status)

    asyncio.run(submit.follow(Client(), "w48", patience=0))
    printed = capsys.readouterr()
    assert printed.out == "one\ntwo\nthree\nfour\n"
    assert "the log of w48 was interrupted: WebSocket connection closed" in printed.err


@dataclass(frozen=True)
class Cluster:
    address: str
    folder: Path
    environment: dict[str, str]

    def begin(self, tick: str, *command: str) -> subprocess.Popen:
        return subprocess.Popen(
            [
                *(sys.executable, str(SCHEDULES / "submit.py"), "--address", self.address, "--submission-id", tick),
                *("--", *command),
            ],
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, tick: str, *command: str) -> tuple[int, str]:
        process = self.begin(tick, *command)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Ray cluster with a token, apart from any other Ray of this machine."""
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
            wait_until(60, lambda: ray.poll() is not None or read_log(log).count("Ray runtime started"), "Ray runs")
            assert ray.poll() is None, read_log(log)
            yield Cluster(f"http://127.0.0.1:{ports[0]}", Path(folder), environment)
            ray.terminate()


def read_log(log: Any) -> str:
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
def test_a_final_exit_code_is_not_run_again(code: int, cluster: Cluster):
    file = cluster.folder / f"answered-{code}"
    command = ("sh", "-c", f"echo 'it ran'; echo x >> {file}; exit {code}")
    first, again = (cluster.run(f"answer-{code}", *command) for _ in range(2))
    assert (first[0], again[0]) == (code, code)
    assert "it ran\n" in first[1]
    assert "ended in an earlier start of this tick" in again[1]
    assert file.read_text() == "x\n"


@pytest.mark.long
def test_a_failure_is_tried_again_under_the_next_name(cluster: Cluster):
    """The next name is skipped if another tick's job has it."""
    assert cluster.run("2026-11-2", "true")[0] == 0
    file = cluster.folder / "tries"
    script = f"echo x >> {file}; test $(wc -l < {file}) -gt 2 || exit $(wc -l < {file})"
    left = [cluster.run("2026-11", "sh", "-c", script) for _ in range(4)]
    assert [code for code, _ in left] == [1, 2, 0, 0]
    assert ["following 2026-11\n" in left[0][1], "following 2026-11-3\n" in left[1][1]] == [True, True]
    assert "following 2026-11-4\n" in left[2][1]
    assert file.read_text() == "x\n" * 3


@pytest.mark.long
def test_two_starts_of_a_tick_are_one_job(cluster: Cluster):
    file = cluster.folder / "once"
    both = [cluster.begin("once", "sh", "-c", f"echo x >> {file}; sleep 5; exit 10") for _ in range(2)]
    said = [each.communicate(timeout=120)[0] for each in both]
    assert [each.returncode for each in both] == [10, 10]
    assert all("following once\n" in text for text in said)
    assert file.read_text() == "x\n"


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_job_and_waits_until_it_has_saved(number: signal.Signals, code: int, cluster: Cluster):
    file, tick = cluster.folder / f"saved-{code}", f"stopped-{code}"
    job = f"trap 'sleep 2; echo saved >> {file}; exit 0' TERM; touch {file}; while :; do sleep 0.1; done"
    process = cluster.begin(tick, "bash", "-c", job)
    wait_until(60, file.exists, "the job runs")
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert file.read_text() == "saved\n"
    assert f"following {tick}-2\n" in cluster.run(tick, "true")[1]


@pytest.mark.long
def test_a_wrong_token_is_refused(cluster: Cluster):
    stranger = Cluster(cluster.address, cluster.folder, cluster.environment | {"RAY_AUTH_TOKEN": "x" * 32})
    code, said = stranger.run("stranger", "touch", str(cluster.folder / "stranger"))
    assert code == 1
    assert "stopped: " in said
    assert not (cluster.folder / "stranger").exists()


# Forwards a port as `ray dashboard` does, without ssh.
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
def test_the_script_for_clouds_hands_its_job_to_a_real_ray(cloud: Cloud, cluster: Cluster):
    """This machine has no /app/job/retrain.py, so Python exits with 2."""
    (cloud.folder / "forward.py").write_text(FORWARD)
    (cloud.folder / "python").unlink()
    real, port = sys.executable, cluster.address.rpartition(":")[2]
    dashboard = f'exec {real} {cloud.folder}/forward.py {port} "$5"'
    (cloud.folder / "ray").write_text(RAY.replace("exec tail -f /dev/null", dashboard))
    path = f"{cloud.folder}:{cluster.environment['PATH']}"
    process = cloud.begin(**cluster.environment | {"PATH": path})
    said, output = process.communicate(timeout=120)
    assert process.returncode == 2, said + output
    assert "can't open file '/app/job/retrain.py'" in said
    assert cloud.calls == [UP, DOWN]
    wait_until(10, cloud.dashboard_is_gone, "the forwarding of the dashboard has ended")
