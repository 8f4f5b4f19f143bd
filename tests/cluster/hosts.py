"""Isolated hosts of a Ray cluster on this machine, which a test may kill or disconnect.

A host is a network namespace, connected to a bridge in a namespace of its own: no packet leaves this machine, and none
enters. Its processes live in a PID namespace, whose first process restarts Ray whenever it ends, as systemd or
Kubernetes does. Killing that one ends all at once, like a power failure. The hosts share the disk, but not /dev/shm.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("ip", "setpriv", "unshare")
DASHBOARD = "http://127.0.0.1:8265"  # in the head's own network
_PREFIX = "fracture-hosts"
_SUBNET = "10.213.77"
_FIRST_PROCESS = 'mount -t tmpfs tmpfs /dev/shm; while :; do "$@"; sleep 1; done'


@cache
def why_not() -> str:
    """Return the reason why this machine cannot have hosts, or an empty string."""
    if sys.platform != "linux" or (missing := [tool for tool in TOOLS if not shutil.which(tool)]):
        return f"hosts need Linux with iproute2 and util-linux: no {', '.join(missing)}"
    if os.geteuid() != 0:
        return "hosts are network namespaces, which need root"
    try:
        with _namespace(f"{_PREFIX}-{os.getpid()}-probe") as name:
            _ip("-n", name, "link", "add", "bridge", "type", "bridge")
            _run("unshare", "--pid", "--fork", "--mount-proc", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm")
    except subprocess.CalledProcessError as error:
        return f"hosts are not allowed here: {' '.join(error.cmd)}: {error.stderr.strip()}"
    return ""


def wait_until(seconds: float, reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


@contextmanager
def switch() -> Iterator[Switch]:
    """Create a network without hosts; hosts that are added end with it."""
    _clear_away()
    folder = _folder(os.getpid())
    folder.mkdir()
    with _namespace(f"{_PREFIX}-{os.getpid()}-switch") as name:
        _ip("-n", name, "link", "add", "bridge", "type", "bridge")
        _ip("-n", name, "link", "set", "bridge", "up")
        network = Switch(name, folder)
        try:
            yield network
        finally:
            for host in network.hosts:
                host.remove()
            shutil.rmtree(folder)


@dataclass
class Switch:
    namespace: str
    folder: Path
    hosts: list[Host] = field(default_factory=list)

    def add(self, name: str, cpus: int = 1) -> Host:
        """Add a host with Ray running on it; the first is the head."""
        host = Host(name, self, f"{_SUBNET}.{len(self.hosts) + 1}", cpus)
        self.hosts.append(host)
        host.plug_in()
        host.start()
        return host


@dataclass
class Host:
    name: str
    switch: Switch
    address: str
    cpus: int
    first: subprocess.Popen | None = None

    @property
    def namespace(self) -> str:
        return f"{_PREFIX}-{os.getpid()}-{self.name}"

    @property
    def log(self) -> Path:
        """Output of `ray start`."""
        return self.switch.folder / f"{self.name}.log"

    def plug_in(self) -> None:
        _ip("netns", "add", self.namespace)
        _ip("link", "add", self.name, "netns", self.switch.namespace, "type", "veth",
            "peer", "name", "eth0", "netns", self.namespace)  # fmt: skip
        _ip("-n", self.namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip("-n", self.namespace, "link", "set", link, "up")
        _ip("-n", self.switch.namespace, "link", "set", self.name, "up")
        self.heal()

    def start(self) -> None:
        """Start the host and wait for Ray."""
        started = self._starts()
        with self.log.open("a") as log:
            self.first = subprocess.Popen(
                [*_inside(self.namespace), "unshare", "--pid", "--fork", "--kill-child", "--mount-proc",
                 "sh", "-c", _FIRST_PROCESS, "sh", *self._ray_start()],
                env=environment(), cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        wait_until(60, lambda: self._starts() > started, f"Ray on {self.name}, see {self.log}")

    def kill(self) -> None:
        """Kill all processes of the host at once."""
        psutil.Process(self.first.pid).children()[0].kill()
        self.first.wait()
        assert not self.processes()

    def cut(self) -> None:
        """Disconnect the host without notice: its interface stays up, and its packets are lost."""
        _ip("-n", self.switch.namespace, "link", "set", self.name, "nomaster")

    def heal(self) -> None:
        _ip("-n", self.switch.namespace, "link", "set", self.name, "master", "bridge")

    def remove(self) -> None:
        if self.first is not None and self.first.poll() is None:
            self.kill()
        _ip("netns", "delete", self.namespace)

    def processes(self, title: str = "") -> list[psutil.Process]:
        """List the host's processes whose command line contains `title`."""
        return _processes(self.namespace, title)

    def node_id(self) -> str:
        """Return the id of the host's node in Ray."""
        (raylet,) = self.processes("raylet/raylet ")
        (found,) = (part for part in raylet.cmdline() if part.startswith("--node_id="))
        return found.partition("=")[2]

    def command(self, *arguments: str) -> list[str]:
        """Return a command line that runs in this host's network."""
        return [*_inside(self.namespace), *arguments]

    def _ray_start(self) -> list[str]:
        head = self.switch.hosts[0]
        role = ["--head", "--dashboard-host=127.0.0.1"] if head is self else [f"--address={head.address}:6379"]
        return [
            "ray", "start", "--block", "--disable-usage-stats", *role, f"--node-ip-address={self.address}",
            f"--num-cpus={self.cpus}", f"--object-store-memory={100 * 2**20}",
            f"--temp-dir={self.switch.folder / self.name}",
        ]  # fmt: skip

    def _starts(self) -> int:
        return self.log.read_text().count("Ray runtime started") if self.log.exists() else 0


def environment() -> dict[str, str]:
    """Return the environment of hosts and clients: nothing of the tests' own Ray, and a token of this process only."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": f"token-of-{os.getpid()}-and-of-no-other-cluster"}
    return kept | token | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def _inside(namespace: str) -> list[str]:
    """Return a prefix that runs a command in the namespace and ends it with the process that started it."""
    return ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", namespace]


def _processes(namespace: str, title: str = "") -> list[psutil.Process]:
    found = []
    for pid in _ip("netns", "pids", namespace).split():
        try:
            process = psutil.Process(int(pid))
            if process.status() != psutil.STATUS_ZOMBIE and title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


@contextmanager
def _namespace(name: str) -> Iterator[str]:
    _ip("netns", "add", name)
    try:
        yield name
    finally:
        _ip("netns", "delete", name)


def _clear_away() -> None:
    """Remove namespaces and folders of test sessions that were killed."""
    for name in (line.split()[0] for line in _ip("netns", "list").splitlines()):
        prefix, _, rest = name.rpartition(_PREFIX + "-")
        owner = rest.split("-")[0]
        if prefix == "" and owner.isdigit() and (int(owner) == os.getpid() or not psutil.pid_exists(int(owner))):
            for process in _processes(name):
                process.kill()
            _ip("netns", "delete", name)
            shutil.rmtree(_folder(int(owner)), ignore_errors=True)


def _folder(owner: int) -> Path:
    """Return a short path: a socket's path has at most 107 characters, and Ray needs 70 of them."""
    return Path(f"/tmp/fracture-{owner}")


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
