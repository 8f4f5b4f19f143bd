"""The number format that this hardware computes fast."""

from pathlib import Path

# Mixed precision keeps weights in float32 and computes in 16 bits: https://arxiv.org/abs/1710.03740


def choose_precision(setting: str) -> str:
    """Return the Keras policy for `training.precision` on this machine."""
    if setting != "auto":
        return setting
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0))
        return choose_gpu_precision(capability)
    return choose_cpu_precision(_read_cpu_flags())


def choose_gpu_precision(compute_capability: tuple[int, int]) -> str:
    """Return bfloat16 from Ampere (8.0) on, and float16 with loss scaling where there are tensor cores (7.0)."""
    if compute_capability >= (8, 0):
        return "mixed_bfloat16"
    return "mixed_float16" if compute_capability >= (7, 0) else "float32"


def choose_cpu_precision(flags: set[str]) -> str:
    """Return bfloat16 where the processor multiplies matrices of it natively."""
    return "mixed_bfloat16" if flags & {"amx_bf16", "avx512_bf16"} else "float32"


def _read_cpu_flags() -> set[str]:
    """Return the processor's features; none where the system does not list them, as on macOS."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())
