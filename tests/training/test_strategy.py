import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import shell


@pytest.mark.long
def test_what_xla_compiled_is_kept_and_read_again(tmp_path: Path):
    """In a process of its own, since TensorFlow reads the flags when it loads."""
    code = (
        "import sys; from pathlib import Path; from fracture.training.strategy import keep_compiled; "
        "keep_compiled(Path(sys.argv[1]) / 'cache', 'CPU'); import tensorflow as tf; "
        "print(tf.function(lambda x: tf.reduce_sum(x @ x), jit_compile=True)(tf.ones((8, 8))).numpy())"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    kept = []
    for _ in range(2):
        done = subprocess.run(command, env=shell(), capture_output=True, text=True, check=True)
        assert done.stdout == "512.0\n"
        kept.append({file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()})
    assert len(kept[0]) == 1
    assert kept[0] == kept[1]
