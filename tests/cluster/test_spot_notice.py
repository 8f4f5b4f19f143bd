"""The program against a server that answers like a cloud's metadata, and a `ray` that records its arguments."""

import http.server
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import spot_notice

SCRIPT = Path(__file__).resolve().parents[2] / "cluster/spot_notice.py"


@contextmanager
def metadata(answers: list[tuple[int, str]]) -> Iterator[str]:
    """Yield the address of a server that gives the answers in turn and checks that requests are as the clouds want."""

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
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def environment(tmp_path: Path) -> dict[str, str]:
    ray = tmp_path / "ray"
    ray.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    ray.chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}


@pytest.mark.parametrize(
    ("cloud", "answers", "seconds"),
    [
        ("aws", [(404, ""), (200, '{"action": "terminate", "time": "2026-11-24T08:22:00Z"}')], 110),
        ("gcp", [(200, "FALSE"), (503, ""), (200, "TRUE")], 25),
    ],
)
def test_the_node_is_drained_when_the_notice_comes_and_not_before(cloud, answers, seconds, tmp_path, monkeypatch):
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", None)  # read TMPDIR again
    monkeypatch.setattr(spot_notice, "POLL_SECONDS", 0)
    with metadata(answers) as address:
        spot_notice.main(cloud, address)
    assert answers == []
    assert (tmp_path / "calls").read_text() == (
        "drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot notice "
        f"--deadline-remaining-seconds {seconds}\n"
    )


def test_a_second_one_on_the_machine_exits(tmp_path):
    """The first one waits forever, since no metadata server answers."""
    command = [sys.executable, SCRIPT, "aws", "http://127.0.0.1:9"]
    with subprocess.Popen(command, env=environment(tmp_path)) as first:
        while not (tmp_path / "spot_notice.lock").exists():
            assert first.poll() is None
        second = subprocess.run(command, env=environment(tmp_path), check=False, timeout=60)
        assert second.returncode == 0
        assert first.poll() is None
        first.kill()
    assert not (tmp_path / "calls").exists()


def test_ray_has_the_command():
    """`ray drain-node` is not documented, so that another version of Ray may lack it."""
    from click.testing import CliRunner
    from ray.scripts.scripts import cli

    output = CliRunner().invoke(cli, ["drain-node", "--help"]).output
    for flag in ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "--deadline-remaining-seconds"):
        assert flag in output
