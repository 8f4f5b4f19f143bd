import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from fracture.arrays import Expected, limit_bytes, load_arrays, parse_arrays, save_arrays
from fracture.errors import UsageError

FLOAT = np.dtype(np.float32)
EXPECTED = [Expected("kernel:0", (3, 4), FLOAT), Expected("step", (), np.dtype(np.int64))]
ARRAYS = {"kernel:0": np.arange(12, dtype=np.float32).reshape(3, 4), "step": np.array(7)}
NAMED = ("my.safetensors", "Make it anew.")  # in errors


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_arrays(tmp_path / "weights.safetensors", ARRAYS)
    return tmp_path / "weights.safetensors"


def written(tmp_path: Path, arrays: dict[str, np.ndarray]) -> bytes:
    save_arrays(tmp_path / "a.safetensors", arrays)
    return (tmp_path / "a.safetensors").read_bytes()


def raw(header: dict[str, Any] | bytes, body: bytes = b"", length: int | None = None) -> bytes:
    """A file with any header, which may claim any length of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_arrays_come_back_by_name_and_in_the_order_expected(saved: Path):
    loaded = load_arrays(saved.read_bytes(), EXPECTED, *NAMED)
    assert all(map(np.array_equal, loaded, ARRAYS.values()))
    assert [array.dtype for array in loaded] == [FLOAT, np.int64]
    assert np.array_equal(load_arrays(saved.read_bytes(), EXPECTED[::-1], *NAMED)[1], ARRAYS["kernel:0"])
    assert load_file(saved)["step"] == 7, "readable by safetensors alone"


def test_metadata_comes_back(tmp_path: Path):
    save_arrays(tmp_path / "a.safetensors", ARRAYS, {"state": '{"epoch": 3}'})
    arrays, metadata = parse_arrays((tmp_path / "a.safetensors").read_bytes())
    assert arrays.keys() == ARRAYS.keys()
    assert metadata == {"state": '{"epoch": 3}'}


def test_no_array_at_all(tmp_path: Path):
    assert load_arrays(written(tmp_path, {}), [], *NAMED) == []


def test_an_array_in_the_order_of_fortran_comes_back_as_it_was(tmp_path: Path):
    arrays, _ = parse_arrays(written(tmp_path, {"a": ARRAYS["kernel:0"].T}))
    assert np.array_equal(arrays["a"], ARRAYS["kernel:0"].T)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"step": ARRAYS["step"]}, "holds no array 'kernel:0', one of 2 that are expected"),
        (ARRAYS | {"more": ARRAYS["step"]}, "holds an array 'more' that is not expected"),
        (
            ARRAYS | {"kernel:0": ARRAYS["kernel:0"].reshape(4, 3)},
            r"holds 'kernel:0' as float32 of shape \(4, 3\), and float32 of shape \(3, 4\)",
        ),
        (
            ARRAYS | {"kernel:0": ARRAYS["kernel:0"].view(np.int32)},
            r"holds 'kernel:0' as int32 of shape \(3, 4\), and float32",
        ),
    ],
    ids=["missing", "more", "shape", "dtype"],
)
def test_other_arrays_than_expected_are_named(tmp_path: Path, arrays: dict[str, np.ndarray], message: str):
    with pytest.raises(UsageError, match=rf"^my.safetensors {message}.* Make it anew.$"):
        load_arrays(written(tmp_path, arrays), EXPECTED, *NAMED)


@pytest.mark.parametrize("array", [np.array([print], dtype=object), np.array(["text"])], ids=["objects", "text"])
def test_only_numbers_are_saved(tmp_path: Path, array: np.ndarray):
    with pytest.raises(Exception, match=r"object|str"):
        save_arrays(tmp_path / "a.safetensors", {"a": array})


BOMBS = {
    "immense header": (raw(b"{}", length=2**63), "header too large"),
    "header beyond the file": (raw(b"{}", length=10**7), "invalid header length"),
    "nested header": (raw(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"), "recursion limit"),
    "huge shape": (raw({"a": entry([200_000, 200_000], 0, 4)}, bytes(4)), "not a whole .safetensors file"),
    "overflowing shape": (raw({"a": entry([2**62, 2**62], 0, 4)}, bytes(4)), "overflow"),
    "immense empty shape": (raw({"a": entry([0, 2**40, 2**40], 0, 0)}), "not a whole .safetensors file"),
    "negative shape": (raw({"a": entry([-1], 0, 4)}, bytes(4)), "invalid value"),
    "same bytes twice": (raw({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)), "invalid offset"),
    "overlapping": (raw({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), "invalid offset"),
    "out of range": (raw({"a": entry([2], 0, 8)}, bytes(4)), "not fully covered"),
    "far out of range": (raw({"a": entry([1], 2**40, 2**40 + 4)}, bytes(4)), "invalid offset"),
    "hole": (raw({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "invalid offset"),
    "bytes after the last array": (raw({"a": entry([1], 0, 4)}, bytes(8)), "not fully covered"),
    "two of a name": (
        raw(b'{"a":%b,"a":%b}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), bytes(4)),
        "two arrays have one name",
    ),
    "objects": (raw({"a": entry([1], 0, 8, "O")}, bytes(8)), "unknown variant `O`"),
    "a type that NumPy has not": (raw({"a": entry([2], 0, 4, "BF16")}, bytes(4)), "of type BF16, which NumPy does not"),
    "no checksum": (save(ARRAYS), "has no checksum"),
    "another checksum": (save(ARRAYS, {"sha256": "0" * 64}), "a byte has changed since it was written"),
    "empty file": (b"", "header too small"),
    "pickle": (b"\x80\x04c__builtin__\nprint\n.", "not a whole .safetensors file"),
    "zip": (b"PK\x03\x04" + bytes(100), "not a whole .safetensors file"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_no_file_takes_more_memory_than_it_has(bomb: str):
    data, message = BOMBS[bomb]
    tracemalloc.start()
    with pytest.raises(UsageError, match=rf"^my.safetensors .*{message}.* Make it anew.$"):
        load_arrays(data, EXPECTED, *NAMED)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6


def test_the_limit_has_room_for_the_header_and_little_more(saved: Path):
    numbers = 12 * 4 + 8
    assert numbers < saved.stat().st_size < limit_bytes(EXPECTED) < numbers + 3 * 4096 + 1


def test_no_damage_gets_past_as_another_error(saved: Path):
    whole = saved.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        data[generator.integers(len(data))] ^= 1 << generator.integers(8)
        with pytest.raises(UsageError):
            load_arrays(bytes(data), EXPECTED, *NAMED)
    for length in range(0, len(whole), 7):
        with pytest.raises(UsageError):
            load_arrays(whole[:length], EXPECTED, *NAMED)
    with pytest.raises(UsageError):
        load_arrays(whole + b"\0", EXPECTED, *NAMED)
