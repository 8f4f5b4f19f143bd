import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fracture.arrays import Expected, load_arrays, save_arrays
from fracture.errors import UsageError

FLOAT = np.dtype(np.float32)
WANTED = [Expected("kernel:0", (3, 4), FLOAT), Expected("step", (), np.dtype(np.int64))]
ARRAYS = [np.arange(12, dtype=np.float32).reshape(3, 4), np.array(7)]
NAMED = ("my.npz", "Make it anew.")  # in errors
HUGE = (200_000, 200_000)


def header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return stream.getvalue()


def pickled() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, arr_0=np.array([print], dtype=object))
    return stream.getvalue()


def test_arrays_come_back_by_name_and_in_order(tmp_path: Path):
    file = tmp_path / "weights.npz"
    save_arrays(file, ARRAYS, [wanted.name for wanted in WANTED])
    for source in (file, file.read_bytes()):
        loaded = load_arrays(source, WANTED, *NAMED)
        assert all(map(np.array_equal, loaded, ARRAYS))
        assert [array.dtype for array in loaded] == [FLOAT, np.int64]
    assert np.array_equal(load_arrays(file, WANTED[::-1], *NAMED)[1], ARRAYS[0])
    assert np.load(file)["step"] == 7


def test_arrays_without_names_keep_their_order_beyond_ten(tmp_path: Path):
    save_arrays(tmp_path / "a.npz", [np.array(number) for number in range(25)])
    assert [int(array) for array in load_arrays(tmp_path / "a.npz", 25 * 8, *NAMED)] == list(range(25))
    with pytest.raises(UsageError, match="holds 200 bytes of numbers, over the limit of 199"):
        load_arrays(tmp_path / "a.npz", 199, *NAMED)


def test_no_array_at_all(tmp_path: Path):
    save_arrays(tmp_path / "a.npz", [])
    assert load_arrays(tmp_path / "a.npz", 0, *NAMED) == []


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"step": ARRAYS[1]}, "holds no array 'kernel:0', one of 2 that are expected"),
        ({"kernel:0": ARRAYS[0], "step": ARRAYS[1], "more": ARRAYS[1]}, "holds an array 'more' that is not expected"),
        ({"kernel:0": ARRAYS[0].T, "step": ARRAYS[1]}, r"holds 'kernel:0' as float32 of shape \(4, 3\), not as plain"),
        (
            {"kernel:0": ARRAYS[0].reshape(4, 3), "step": ARRAYS[1]},
            r"as float32 of shape \(4, 3\), and float32 of shape \(3, 4\)",
        ),
        (
            {"kernel:0": ARRAYS[0].view(np.int32), "step": ARRAYS[1]},
            r"holds 'kernel:0' as int32 of shape \(3, 4\), and",
        ),
        (
            {"kernel:0": ARRAYS[0].astype("U9"), "step": ARRAYS[1]},
            r"holds 'kernel:0' as <U9 of shape .* not as plain num",
        ),
    ],
    ids=["missing", "more", "fortran", "shape", "dtype", "text"],
)
def test_other_arrays_than_expected_are_named(arrays: dict[str, np.ndarray], message: str):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    with pytest.raises(UsageError, match=message):
        load_arrays(stream.getvalue(), WANTED, *NAMED)


@pytest.mark.parametrize("limit", [[Expected("arr_0", (1,), np.dtype(object))], 1000], ids=["expected", "limit"])
def test_objects_are_never_loaded(limit):
    with pytest.raises(UsageError, match=r"^my.npz holds Python objects in 'arr_0', .* never loaded. Make it anew.$"):
        load_arrays(pickled(), limit, *NAMED)


def same_bytes_twice() -> bytes:
    """Two names for one stretch of the file, as in the bombs of https://www.bamsoftware.com/hacks/zipbomb/."""
    data = bytearray(archive({"arr_0.npy": header((250,)) + bytes(1000), "arr_1.npy": header((250,)) + bytes(1000)}))
    second = data.rindex(b"PK\x01\x02")
    struct.pack_into("<I", data, second + 42, 0)  # offset of its local header
    return bytes(data)


BOMBS = {
    "zip bomb": (
        archive({"arr_0.npy": header((10**7,)) + bytes(4 * 10**7)}, zipfile.ZIP_DEFLATED),
        "holds a compressed array",
    ),
    "bzip2 bomb": (
        archive({"arr_0.npy": header((10**7,)) + bytes(4 * 10**7)}, zipfile.ZIP_BZIP2),
        "holds a compressed array",
    ),
    "huge shape": (archive({"arr_0.npy": header(HUGE)}), "holds 160,000,000,000 bytes of numbers, over the limit"),
    "more than there is": (archive({"arr_0.npy": header((10**6,))}), "has 244 bytes, and its arrays take 4,000,000 to"),
    "overflowing shape": (archive({"arr_0.npy": header((2**62, 2**62))}), "over the limit"),
    "negative shape": (archive({"arr_0.npy": header((-1, 2**40))}), "not as plain numbers"),
    "nested header": (archive({"arr_0.npy": b"\x93NUMPY\x01\x00\x00\x20" + b"-" * 8191 + b"1"}), "cannot be read"),
    "long header": (archive({"arr_0.npy": b"\x93NUMPY\x01\x00\xff\xff" + b" " * 65535}), "cannot be read"),
    "other npy format": (archive({"arr_0.npy": b"\x93NUMPY\x03\x00\xff\xff\xff\xff"}), "not of npy format 1.0"),
    "two of a name": (archive({"arr_0.npy": header((1,)), "arr_0": header((1,))}), "two arrays of one name"),
    "same bytes twice": (same_bytes_twice(), "no whole .npz file|a damaged array|cannot be read"),
    "many names": (archive({f"{n}.npy": b"" for n in range(9999)}), "holds no array 'arr_0', one of 9999 that are"),
    "a way out": (archive({"../../arr_0.npy": header((1,)) + bytes(4)}), "holds no array 'arr_0'"),
    "empty file": (b"", "is no whole .npz file"),
    "no zip": (b"\x80\x04c__builtin__\nprint\n.", "is no whole .npz file"),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_no_file_takes_more_memory_than_it_may(bomb: str):
    data, message = BOMBS[bomb]
    tracemalloc.start()
    with pytest.raises(UsageError, match=message):
        load_arrays(data, 10**7, *NAMED)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e7


def test_the_shape_is_compared_before_memory_is_set_aside():
    """The file is as large as it should be, and its first array says it is immense."""
    data = archive({"kernel:0.npy": header(HUGE) + bytes(48), "step.npy": header((), "<i8") + bytes(8)})
    with pytest.raises(
        UsageError, match=r"as float32 of shape \(200000, 200000\), and float32 of shape \(3, 4\) is exp"
    ):
        load_arrays(data, WANTED, *NAMED)


@pytest.mark.filterwarnings("ignore")
def test_no_damage_gets_past_as_another_error(tmp_path: Path):
    save_arrays(tmp_path / "a.npz", ARRAYS, [wanted.name for wanted in WANTED])
    whole = (tmp_path / "a.npz").read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        data[generator.integers(len(data))] ^= 1 << generator.integers(8)
        try:
            loaded = load_arrays(bytes(data), WANTED, *NAMED)
        except UsageError:
            continue
        assert all(map(np.array_equal, loaded, ARRAYS)), "a bit that matters has flipped, and nobody noticed"
    for length in range(0, len(whole), 7):
        with pytest.raises(UsageError):
            load_arrays(whole[:length], WANTED, *NAMED)
