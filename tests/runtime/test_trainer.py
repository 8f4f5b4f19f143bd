import json
import os
import re
import subprocess
import sys

import pytest

from fracture.runtime.trainer import find_own_address, set_cluster


def test_an_address_has_a_port_that_is_free(ray_cluster):
    first, second = find_own_address(), find_own_address()
    assert re.fullmatch(r"[\d.]+:\d+", first)
    assert first != second


def test_an_address_of_ipv6_stands_in_brackets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "::1")
    assert re.fullmatch(r"\[::1\]:\d+", find_own_address())


def test_a_worker_hears_of_the_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TF_CONFIG", "")
    set_cluster(["a:1", "b:2"], 1)
    assert json.loads(os.environ["TF_CONFIG"]) == {
        "cluster": {"worker": ["a:1", "b:2"]},
        "task": {"type": "worker", "index": 1},
    }


def test_the_controller_loads_no_tensorflow():
    """It unpickles the backend and the hook, and with them imports their modules."""
    code = (
        "import sys, fracture.runtime.trainer, fracture.runtime.ray_internals, fracture.training.loop; "
        "assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
