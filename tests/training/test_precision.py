import pytest

from fracture.training.precision import choose_cpu_precision, choose_gpu_precision, choose_precision


@pytest.mark.parametrize(
    ("flags", "policy"),
    [
        ({"avx512f", "amx_bf16"}, "mixed_bfloat16"),
        ({"avx512_bf16"}, "mixed_bfloat16"),
        ({"avx2"}, "float32"),
        (set(), "float32"),
    ],
)
def test_cpus(flags: set[str], policy: str):
    assert choose_cpu_precision(flags) == policy


@pytest.mark.parametrize(
    ("capability", "policy"),
    [((9, 0), "mixed_bfloat16"), ((8, 0), "mixed_bfloat16"), ((7, 5), "mixed_float16"), ((6, 1), "float32")],
)
def test_gpus(capability: tuple[int, int], policy: str):
    assert choose_gpu_precision(capability) == policy


def test_what_is_asked_for_is_taken():
    assert choose_precision("float32") == "float32"
    assert choose_precision("auto") in ("float32", "mixed_bfloat16", "mixed_float16")
