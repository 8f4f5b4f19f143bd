"""The CPUs and GPUs of this process, before TensorFlow uses them."""

from contextlib import suppress

from fracture.errors import RunError
from fracture.runtime.gpus import explain_missing_gpu


def limit_devices(cpus: int | None, *, gpu: bool, kernels: int = 1) -> None:
    """Keep this process to what Ray has given it; TensorFlow would take all there is.

    Args:
        cpus: None for all.
        gpu: whether a GPU is its own. It takes memory of that as it needs it. Otherwise it sees none: Ray hides the
            GPUs of others only from those that have one.
        kernels: at a time, of `cpus` threads in all.

    Raises:
        RunError: it has a GPU, and TensorFlow sees none.
    """
    import tensorflow as tf

    devices = tf.config.list_physical_devices("GPU")
    if gpu and not devices:
        raise RunError(
            f"compute.gpu is set, and TensorFlow sees no GPU on this worker: {explain_missing_gpu()}. Run fracture "
            "doctor on its machine"
        )
    if cpus:
        tf.config.threading.set_intra_op_parallelism_threads(cpus)
        tf.config.threading.set_inter_op_parallelism_threads(kernels)
    if not gpu:
        tf.config.set_visible_devices([], "GPU")
    for device in tf.config.get_visible_devices("GPU"):
        tf.config.experimental.set_memory_growth(device, True)


def hide_gpus() -> None:
    """Keep this process off the GPUs; too late once TensorFlow has used one."""
    import fracture.models  # noqa: F401 - first: it keeps TensorFlow quiet as it loads

    import tensorflow as tf  # isort: skip

    with suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
