"""Which number format this hardware computes fast."""

from pathlib import Path

# Mixed precision keeps weights in float32 and computes in 16 bits: https://arxiv.org/abs/1710.03740


def choose_precision(asked: str) -> str:
    """The Keras policy for `training.precision`, on the machine that calls."""
    if asked != "auto":
        return asked
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0))
        return precision_of_gpu(capability)
    return precision_of_cpu(_cpu_flags())


def precision_of_gpu(compute_capability: tuple[int, int]) -> str:
    """bfloat16 from Ampere (8.0) on, float16 with loss scaling where there are tensor cores (7.0)."""
    if compute_capability >= (8, 0):
        return "mixed_bfloat16"
    return "mixed_float16" if compute_capability >= (7, 0) else "float32"


def precision_of_cpu(flags: set[str]) -> str:
    return "mixed_bfloat16" if flags & {"amx_bf16", "avx512_bf16"} else "float32"


def _cpu_flags() -> set[str]:
    """Empty where the system does not tell, as on macOS."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())
