"""Probabilities of every file of a folder or a bucket, or of every row of shards. The one file of this room that knows
Ray.

Ray Data maps blocks of as many files as evaluation scores at a time, scores them in the same parts, and keeps their
order. The driver holds names and probabilities, some hundred bytes a file, and no image.
"""

import logging
import os
import tempfile
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from fracture.dataset.format import FILES, MANIFEST, Dataset, images_of, read_dataset
from fracture.errors import RunError, UsageError
from fracture.evaluation.scores import BLOCK_ROWS, score
from fracture.inference.bundle import Bundle
from fracture.labels import CLASS_NAMES, FRACTURE
from fracture.preparation.decode import Rejected, check_file_size, decode
from fracture.preparation.source import is_clutter, list_files
from fracture.storage import StoragePath

RESULTS = pa.schema(
    [
        pa.field("path", pa.string()),  # below --data; of several --data, the whole path or URI
        pa.field("probability", pa.float32()),  # of a fracture, calibrated; null where there is an error
        pa.field("decision", pa.string()),  # fracture or normal, by the bundle's threshold; null likewise
        pa.field("error", pa.string()),  # why the file cannot be read; null where it can
    ]
)
_WORK = pa.schema(  # one row is one block: files, or rows of shards
    [
        pa.field("input", pa.int64()),
        pa.field("paths", pa.list_(pa.string())),
        pa.field("sizes", pa.list_(pa.int64())),
        pa.field("split", pa.string()),  # "" of files
        pa.field("start", pa.int64()),
        pa.field("stop", pa.int64()),
    ]
)
_SUFFIXES = (".csv", ".parquet")
_WANTED = "Name a folder, a file or a URI of radiographs, or a folder of shards."
_AHEAD = 8  # files read while one is decoded: a bucket takes some 50 ms for each
_DEATHS = 2  # of a process at one file before the file is to blame; one may be the machine's fault
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets take for a program

Progress = Callable[[str, int, int | None], None]  # what, done, of how many


@dataclass(frozen=True)
class Input:
    """One `--data`, listed."""

    root: StoragePath  # the folder; of a single file, the one that it is in
    prefix: str  # of its paths in the results
    files: Mapping[str, int] = field(default_factory=dict)  # path below the root -> bytes, in the order of the results
    dataset: Dataset | None = None  # of shards
    alone: bool = False  # one file that was named, and not the folder

    def __len__(self) -> int:
        if self.dataset:
            return sum(self.dataset.rows(split) for split in self.dataset.splits)
        return len(self.files)


def find_inputs(paths: Sequence[StoragePath], image_size: int) -> list[Input]:
    """Lists what is to be predicted; no image is opened.

    Raises:
        UsageError: nothing there, a folder without a file, a link out of one, shards of another size, or a file that is
            named twice.
    """
    found = [_find(path, image_size, several=len(paths) > 1) for path in paths]
    named = Counter(f"{one.root}/{path}" for one in found for path in one.files or [""])
    if double := next((name for name, times in named.items() if times > 1), None):
        raise UsageError(
            f"--data: {double.rstrip('/')!r} is named twice. Name each folder once, and none inside another."
        )
    return found


def _find(path: StoragePath, image_size: int, *, several: bool) -> Input:
    if path.is_file():
        folder = StoragePath(path.filesystem, path.path.rpartition("/")[0] or "/")
        size = path.filesystem.get_file_info(path.path).size
        return Input(folder, f"{folder}/" if several else "", {path.name: size}, alone=True)
    prefix = f"{str(path).rstrip('/')}/" if several else ""
    if all((path / name).is_file() for name in (MANIFEST, FILES)):
        dataset = read_dataset(path)
        if dataset.image_size != image_size:
            raise UsageError(
                f"--data {path}: the model takes images of {image_size} pixels; these shards have "
                f"{dataset.image_size}. Name the radiographs that they were made of instead."
            )
        return Input(path, prefix, dataset=dataset)
    infos = list_files(path, _WANTED)
    return Input(path, prefix, {name: infos[name].size for name in sorted(infos) if not is_clutter(name)})


def check_out(out: StoragePath, inputs: Sequence[Input]) -> None:
    """Said before the work, which may take hours.

    Raises:
        UsageError: `out` is of no format that is known, a folder, or inside the data, which is never written to.
    """
    if not out.name.lower().endswith(_SUFFIXES):
        raise UsageError(f"--out {out}: the name says the format: give it the ending {' or '.join(_SUFFIXES)}.")
    if out.is_dir():
        raise UsageError(f"--out {out}: is a folder. Name a file in it, such as {out / 'predictions.csv'}.")
    for one in inputs:
        data = _real(one.root / next(iter(one.files)) if one.alone else one.root)
        if out.is_local == one.root.is_local and _real(out).startswith(data):
            raise UsageError(
                f"--out {out}: may not lie inside the data, {one.root}, which is never written to. Name another place."
            )


def _real(path: StoragePath) -> str:
    return f"{os.path.realpath(path.path) if path.is_local else path.path}/"


def predict(
    bundle: Bundle,
    inputs: Sequence[Input],
    progress: Progress = lambda what, done, total: None,
    *,
    gpu: bool = False,
    verbose: bool = False,
    block_rows: int = BLOCK_ROWS,
) -> pa.Table:
    """One row of `RESULTS` for each file or row of the inputs, in their order; needs a started Ray.

    On CPUs one process per core reads, decodes and scores: stages of their own would take the cores from each other.
    With `gpu` reading and decoding is left to the CPUs, and one process per GPU scores.

    Raises:
        UsageError, RunError: a damaged bundle or shard, no GPU, or a store or folder that does not answer.
    """
    import ray
    import ray.data

    total = sum(map(len, inputs))
    work = list(_work(inputs, block_rows))
    slim = [Input(one.root, one.prefix, dataset=one.dataset) for one in inputs]  # without the names, for each process
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = context.enable_progress_bars = verbose
    context.print_on_execution_start = verbose
    context.raise_original_map_exception = True  # else what caused Ray Data's own gets lost on its way here
    if not verbose:
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are ours to tell, in a line
    with ray.data.DataContext.current(context):
        data = _pipeline(ray.data.from_arrow(work), len(work), bundle, slim, ray.cluster_resources(), gpu)
        tables, done = [RESULTS.empty_table()], 0
        try:
            for table in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                tables.append(table.cast(RESULTS))
                done += len(table)
                progress("predict", done, total)
        except Exception as error:
            raise (_told(error) or error) from error
    if done != total:
        raise RunError(f"{done:,} results for {total:,} files; run the same command again")
    return pa.concat_tables(tables).combine_chunks()


def _work(inputs: Sequence[Input], block_rows: int) -> Iterator[pa.Table]:
    """Tables of one row, each a block; none of two inputs or two splits."""
    for number, one in enumerate(inputs):
        for split in one.dataset.splits if one.dataset else ():
            rows = one.dataset.rows(split)
            for start in range(0, rows, block_rows):
                yield _block(input=number, split=split, start=start, stop=min(start + block_rows, rows))
        paths = list(one.files)
        for start in range(0, len(paths), block_rows):
            names = paths[start : start + block_rows]
            yield _block(input=number, split="", paths=names, sizes=[one.files[name] for name in names], start=start)


def _block(**columns: Any) -> pa.Table:
    return pa.Table.from_pylist([columns], schema=_WORK)


def _pipeline(
    work: Any, blocks: int, bundle: Bundle, inputs: list[Input], resources: Mapping[str, float], gpu: bool
) -> Any:
    from ray.data import ActorPoolStrategy

    size, job = bundle.image_size, uuid.uuid4().hex
    if gpu and not resources.get("GPU"):
        raise UsageError("--gpu: the cluster has no GPU. Leave it out, or join a cluster that has one.")
    one_block: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    if not gpu:
        # A process takes seconds to start, as does a block of the default network: each gets two or more.
        pool = ActorPoolStrategy(size=max(1, min(int(resources.get("CPU", 1)), -(-blocks // 2))))
        made = {"fn_constructor_args": (bundle, _Reader(inputs, size, job)), "num_cpus": 1}
        return work.map_batches(_Scorer, compute=pool, **one_block, **made)
    images = work.map_batches(_Reader(inputs, size, job).__call__, **one_block, num_cpus=1)
    pool = ActorPoolStrategy(size=max(1, min(int(resources["GPU"]), blocks)))
    # The CPUs are the decoders'.
    made = {"fn_constructor_args": (bundle, None), "num_cpus": 0, "num_gpus": 1}
    return images.map_batches(_Scorer, compute=pool, batch_size=BLOCK_ROWS, batch_format="pyarrow", **made)


class _Reader:
    """From a block of work to its images, one row each: path, image (null where there is none), error."""

    def __init__(self, inputs: list[Input], size: int, job: str) -> None:
        self._inputs, self._size, self._job = inputs, size, job

    def __call__(self, work: pa.Table) -> pa.Table:
        [block] = work.to_pylist()
        one = self._inputs[block["input"]]
        if block["split"]:
            table = one.dataset.read(block["split"], block["start"], block["stop"])
            return self._table(one, table["source"].to_pylist(), table["image"].combine_chunks(), [None] * len(table))
        images, errors = self._decode(one.root, block)
        return self._table(one, block["paths"], pa.array(images, pa.binary(self._size**2)), errors)

    def _table(self, one: Input, paths: list[str], images: pa.Array, errors: list[str | None]) -> pa.Table:
        names = pa.array([one.prefix + path for path in paths], pa.string())
        return pa.table({"path": names, "image": images, "error": pa.array(errors, pa.string())})

    def _decode(self, root: StoragePath, block: Mapping[str, Any]) -> tuple[list[bytes | None], list[str | None]]:
        images: list[bytes | None] = []
        errors: list[str | None] = []
        jobs = [partial(read_file, root, *file) for file in zip(block["paths"], block["sizes"], strict=True)]
        name = f"fracture-{self._job}-{block['input']}-{block['start']}"
        with _Notes(Path(tempfile.gettempdir(), name)) as notes:
            for number, data in enumerate(_ahead(jobs)):
                image, reason = None, None
                try:
                    notes.begin(number)
                    image = decode(data.result(), self._size).pixels.tobytes()
                except Rejected as error:
                    reason = str(error)
                except MemoryError:
                    reason = "takes more memory than there is"
                images.append(image)
                errors.append(reason)
        return images, errors


def read_file(root: StoragePath, path: str, size: int) -> bytes:
    """
    Raises:
        Rejected: the file is too large, gone, or may not be read, while its folder can be.
        UsageError, RunError: the folder or the store does not answer either.
    """
    check_file_size(size)
    try:
        return (root / path).read_bytes()
    except (OSError, UsageError):
        if root.is_dir():
            raise Rejected("cannot be opened") from None
    raise RunError(
        f"{root} is no folder any more, or not on each of Ray's machines, which all read from it. Mount it on all, or "
        "name a bucket; then run the same command again."
    )


def _ahead(jobs: Iterable[Callable[[], bytes]]) -> Iterator[Future[bytes]]:
    """Their outcomes in order, a few of them begun ahead."""
    with ThreadPoolExecutor(_AHEAD) as pool:
        waiting: deque[Future[bytes]] = deque()
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > _AHEAD:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()


class _Notes:
    """On the machine's disk, which file of a block is being decoded.

    Ray begins a block again whose process died, for ever. If a decoder did it, which raises nothing, the note is still
    there, and after some deaths at one file that file is passed over.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._deaths = file.read_text().split() if file.exists() else []

    def __enter__(self) -> "_Notes":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.unlink(missing_ok=True)

    def begin(self, number: int) -> None:
        """Raises Rejected where this file has had its deaths."""
        if self._deaths.count(str(number)) >= _DEATHS:
            raise Rejected("crashes the decoder")
        self._file.write_text(" ".join([*self._deaths, str(number)]))


class _Scorer:
    """From a block of work, or of images where there is no reader, to rows of `RESULTS`."""

    def __init__(self, bundle: Bundle, reader: _Reader | None) -> None:
        self._bundle, self._reader = bundle, reader

    @cached_property
    def _model(self) -> Any:
        """Loaded with the first block: Ray would try a constructor that fails again and again."""
        import tensorflow as tf

        if self._reader:  # one process a core
            tf.config.threading.set_intra_op_parallelism_threads(1)
            tf.config.threading.set_inter_op_parallelism_threads(1)
        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)
        return self._bundle.model()

    def __call__(self, table: pa.Table) -> pa.Table:
        images = self._reader(table) if self._reader else table
        readable = images["image"].is_valid()
        probabilities = np.empty(len(images), np.float32)
        if pc.any(readable).as_py():
            pixels = images_of(images.filter(readable), self._bundle.image_size)
            probabilities[readable.to_numpy()] = score(self._model, pixels)
        fractured = probabilities >= self._bundle.operating_point.threshold  # in float32, as evaluation compares
        decisions = [CLASS_NAMES[FRACTURE if called else 1 - FRACTURE] for called in fractured]
        missing = pc.invert(readable).to_numpy()
        columns = {
            "path": images["path"],
            "probability": pa.array(probabilities, pa.float32(), mask=missing),
            "decision": pa.array(decisions, pa.string(), mask=missing),
            "error": images["error"],
        }
        return pa.table(columns, schema=RESULTS)


def _told(error: BaseException) -> RunError | UsageError | None:
    """The one line for what ended Ray Data; None for a bug on this side of it."""
    from ray.exceptions import RayError

    for ours in (RunError, UsageError):
        if isinstance(error, ours):  # or Ray's own kind of it, which holds the stacks of all processes
            return ours(str(getattr(error, "cause", error)).partition("\nFailed to apply UDF")[0])
    if isinstance(error, RayError):
        reason = str(error).strip().rpartition("\n")[2]
        return RunError(f"Ray Data gave up: {reason}. Nothing was written. Run again with -v for the traces")
    return None


def write_results(out: StoragePath, results: pa.Table, facts: Mapping[str, str]) -> None:
    """The whole file or nothing; in Parquet with the facts as the schema's metadata.

    A path that begins as a formula is written as it is, or it would be no path any more: `formulas` counts them.
    """
    if out.name.lower().endswith(".parquet"):
        out.write_parquet(results.replace_schema_metadata(dict(facts)))
        return
    sink = pa.BufferOutputStream()
    csv.write_csv(results, sink)
    out.write_bytes(sink.getvalue())


def formulas(results: pa.Table) -> int:
    """Paths that a spreadsheet would run."""
    return sum(path.startswith(_FORMULA) for path in results["path"].to_pylist())


def summary(results: pa.Table, threshold: float) -> list[str]:
    """What was found, in a few aligned lines."""
    called = Counter(results["decision"].to_pylist())
    told = ", ".join(f"{called[name]:,} {name}" for name in reversed(CLASS_NAMES))
    lines = [f"called     {told}; a fracture from a probability of {threshold:.3g} on"]
    reasons = Counter(reason.partition(":")[0] for reason in results["error"].drop_null().to_pylist())
    if reasons:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(3))
        more = f", {len(reasons) - 3} more reasons" if len(reasons) > 3 else ""
        lines.append(f"unreadable {reasons.total():,} files, named with an error each: {listed}{more}")
    return lines
