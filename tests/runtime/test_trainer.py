import json
import os
import re
import socket
import subprocess
import sys

import pytest

from fracture.runtime.trainer import exempt_from_proxy, find_own_address, set_cluster


def test_an_address_has_a_port_that_is_free(ray_cluster):
    first, second = find_own_address(), find_own_address()
    assert re.fullmatch(r"[\d.]+:\d+", first)
    assert first != second


def test_an_address_of_ipv6_stands_in_brackets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "::1")
    assert re.fullmatch(r"\[::1\]:\d+", find_own_address())


def test_a_worker_hears_of_the_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TF_CONFIG", "")
    monkeypatch.setenv("no_grpc_proxy", "")
    set_cluster(["a:1", "b:2"], 1)
    assert json.loads(os.environ["TF_CONFIG"]) == {
        "cluster": {"worker": ["a:1", "b:2"]},
        "task": {"type": "worker", "index": 1},
    }


@pytest.mark.parametrize(
    ("environment", "exempted"),
    [
        ({}, "192.0.2.7,fd00::1"),
        ({"no_proxy": "localhost, 127.0.0.1"}, "localhost,127.0.0.1,192.0.2.7,fd00::1"),
        ({"no_proxy": "localhost", "no_grpc_proxy": "a.b"}, "a.b,192.0.2.7,fd00::1"),
        ({"no_grpc_proxy": "fd00::1,192.0.2.7"}, "fd00::1,192.0.2.7"),
    ],
)
def test_no_proxy_is_asked_for_the_workers_and_for_what_the_user_has_exempted(environment: dict, exempted: str):
    addresses = ["192.0.2.7:4001", "192.0.2.7:4002", "[fd00::1]:4003"]
    assert exempt_from_proxy(addresses, environment) == exempted


@pytest.mark.slow
def test_tensorflow_reaches_its_workers_past_a_proxy():
    """In a process of its own, with a proxy at which nothing listens: TensorFlow would wait for it for ever."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        proxy = {"https_proxy": f"http://127.0.0.1:{bound.getsockname()[1]}", "no_proxy": "localhost,127.0.0.1"}
        code = (
            "import os; from fracture.runtime.trainer import find_own_address, set_cluster; "
            "set_cluster([find_own_address()], 0); import tensorflow as tf; "
            "print(tf.distribute.MultiWorkerMirroredStrategy().num_replicas_in_sync, flush=True); os._exit(0)"
        )
        command = [sys.executable, "-c", code]
        environment = {name: value for name, value in os.environ.items() if name != "no_grpc_proxy"} | proxy
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "1\n"


def test_the_controller_loads_no_tensorflow():
    """It unpickles the backend and the hook, and with them imports their modules."""
    code = (
        "import sys, fracture.runtime.trainer, fracture.runtime.ray_internals, fracture.training.loop; "
        "assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
