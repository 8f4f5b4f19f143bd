"""The real script, a server that answers as a cloud's metadata does, and a `ray` that notes what it is asked."""

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "cluster/spot_notice.py"


@contextmanager
def metadata(answers: list[tuple[int, str]]) -> Iterator[str]:
    """Gives the answers one after the other, to requests as the clouds want them; its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            assert self.path == "/latest/api/token"
            self._answer(200, "TOKEN")

        def do_GET(self) -> None:
            known = (
                ("/latest/meta-data/spot/instance-action", "X-aws-ec2-metadata-token", "TOKEN"),
                ("/computeMetadata/v1/instance/preempted", "Metadata-Flavor", "Google"),
            )
            assert any(self.path == path and self.headers[name] == value for path, name, value in known)
            self._answer(*answers.pop(0))

        def _answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def environment(tmp_path: Path) -> dict[str, str]:
    ray = tmp_path / "ray"
    ray.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    ray.chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}


@pytest.mark.parametrize(
    ("cloud", "answers", "seconds"),
    [
        ("aws", [(404, ""), (200, '{"action": "terminate", "time": "2026-11-24T08:22:00Z"}')], 110),
        ("gcp", [(200, "FALSE"), (503, ""), (200, "TRUE")], 25),
    ],
)
def test_ray_is_told_when_the_notice_comes_and_not_before(cloud: str, answers: list, seconds: int, tmp_path):
    with metadata(answers) as address:
        subprocess.run([sys.executable, SCRIPT, cloud, address], env=environment(tmp_path), check=True, timeout=60)
    assert answers == []
    assert (tmp_path / "asked").read_text() == (
        "drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot notice "
        f"--deadline-remaining-seconds {seconds}\n"
    )


def test_a_second_one_on_the_machine_leaves(tmp_path):
    """Where no metadata answers it waits for ever."""
    command = [sys.executable, SCRIPT, "aws", "http://127.0.0.1:9"]
    with subprocess.Popen(command, env=environment(tmp_path)) as first:
        while not (tmp_path / "spot_notice.lock").exists():
            assert first.poll() is None
        second = subprocess.run(command, env=environment(tmp_path), check=False, timeout=60)
        assert second.returncode == 0
        assert first.poll() is None
        first.kill()
    assert not (tmp_path / "asked").exists()


def test_ray_has_the_command_that_it_gives():
    """`ray drain-node` is not among Ray's public commands."""
    from click.testing import CliRunner
    from ray.scripts.scripts import cli

    told = CliRunner().invoke(cli, ["drain-node", "--help"]).output
    for flag in ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "--deadline-remaining-seconds"):
        assert flag in told
