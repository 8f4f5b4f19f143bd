"""Batch prediction: the probability of every file of a folder or a bucket, or of every row of shards, on Ray Data.

Blocks and batches are as large as in evaluation, and Ray Data keeps their order. The driver holds names and
probabilities, some hundred bytes per file, and no image.
"""

import hashlib
import logging
import os
import tempfile
import uuid
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from fracture.dataset.format import FILES, MANIFEST, Dataset, images_of, read_dataset
from fracture.errors import RunError, UsageError
from fracture.evaluation.devices import limit_devices
from fracture.evaluation.feature_space import FeatureSpace, are_unlike, describe_distances
from fracture.evaluation.operating_point import OperatingPoint
from fracture.evaluation.outcomes import DOUBT, OUTCOMES, join_outcomes, name_outcomes
from fracture.evaluation.scores import BLOCK_ROWS, GPU_BATCH_SIZE, run_in_batches
from fracture.inference.bundle import Bundle, list_marks
from fracture.labels import CLASS_NAMES, FRACTURE
from fracture.preparation.decoding.decode import Rejected, check_file_size, decode, is_blank
from fracture.preparation.decoding.dicom import DicomHeader
from fracture.preparation.decoding.headers import read_headers
from fracture.preparation.facts import hash_pixels
from fracture.preparation.identity import PatientKey, normalise_id, number_study, show_id
from fracture.preparation.layouts.clutter import find_reason, is_clutter
from fracture.preparation.listing import ListedFile, list_files, name_files
from fracture.progress import Progress
from fracture.storage import StoragePath

RESULTS = pa.schema(
    [
        # Relative to --data; with several --data, the whole path or URI. Of a DICOM export, HMACs of them.
        pa.field("path", pa.string()),
        pa.field("study_id", pa.int64()),  # null where studies are not known
        pa.field("probability", pa.float32()),  # of a fracture, calibrated; null if there is an error
        pa.field("decision", pa.string()),  # fracture or normal, by the bundle's threshold; null if there is an error
        # Fracture, doubt or none, by both thresholds; doubt where the image is unlike the training images, or all of a
        # prediction are as a whole; null if there is an error.
        pa.field("outcome", pa.string()),
        # Whether it is unlike the training images, and its distance from them, 1 at the limit; null if there is an
        # error, and where the bundle has no feature space.
        pa.field("unlike", pa.bool_()),
        pa.field("distance", pa.float32()),
        # Whether training or validation had the file, its pixels, or its patient or study, as far as known; null if
        # there is an error.
        pa.field("seen", pa.bool_()),
        pa.field("error", pa.string()),  # why the file is left out ("left out: ...") or cannot be read; else null
    ]
)
# As `_Scorer` returns it: what marks each file, as in the bundle, in place of whether it was seen.
_SCORED = RESULTS.set(RESULTS.get_field_index("seen"), pa.field("marks", pa.list_(pa.binary(32))))
STUDIES = pa.schema(
    [
        pa.field("study_id", pa.int64()),  # null for an image whose study is not known
        pa.field("path", pa.string()),  # of the image with the largest probability
        pa.field("images", pa.int64()),  # without what is left out
        pa.field("unreadable", pa.int64()),  # of the images
        pa.field("probability", pa.float32()),  # null if no image can be read
        pa.field("decision", pa.string()),
        pa.field("outcome", pa.string()),  # see `join_outcomes`
        pa.field(
            "unlike", pa.bool_()
        ),  # whether one of the images is; null if no image can be read, or it is not known
        pa.field("seen", pa.bool_()),  # whether one of the images was; null if no image can be read
        pa.field("error", pa.string()),  # why no image can be read, or there is none; else null
    ]
)
LEFT_OUT = "left out: "  # begins the error of what is no radiograph
_BLOCKS = pa.schema(  # one row is one block of files, or of rows of shards
    [
        pa.field("input", pa.int64()),
        pa.field("paths", pa.list_(pa.binary())),  # as on the disk, where a name may be no UTF-8
        pa.field("names", pa.list_(pa.string())),  # as in the results
        pa.field("studies", pa.list_(pa.int64())),
        pa.field("ids", pa.list_(pa.list_(pa.string()))),
        pa.field("sizes", pa.list_(pa.int64())),
        pa.field("left_out", pa.list_(pa.string())),
        pa.field("split", pa.string()),  # "" for files
        pa.field("start", pa.int64()),
        pa.field("stop", pa.int64()),
    ]
)
_SUFFIXES = (".csv", ".parquet")
_ADVICE = "Name a folder, a file or a URI of radiographs, or a folder of shards."
_READ_AHEAD = 8  # most files read while one is decoded; a bucket takes some 50 ms per file
_READ_AHEAD_BYTES = 2**26  # most of them and the one that is decoded, which alone may have more
_MAX_CRASHES = 2  # at one file before it is skipped; a single crash may have another cause
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # first characters of what spreadsheets run


class InputFile(NamedTuple):
    name: str  # in the results
    size: int  # bytes
    study_id: int | None  # None where it is not known
    ids: tuple[str, ...] = ()  # HMACs of its patient and study
    left_out: str = ""  # why it is no radiograph; "" if it may be one


@dataclass(frozen=True)
class Input:
    """The files, or the shards, of one `--data`."""

    root: StoragePath  # the folder; for a single file its parent
    prefix: str  # of the paths in the results
    files: Mapping[str, InputFile] = field(default_factory=dict)  # path below the root, in the order of the results
    dataset: Dataset | None = None  # where `--data` names shards
    is_single_file: bool = False  # `--data` names a file, not a folder

    def __len__(self) -> int:
        if self.dataset:
            return sum(self.dataset.rows(split) for split in self.dataset.splits)
        return len(self.files)


def find_inputs(
    paths: Sequence[StoragePath],
    image_size: int,
    key: PatientKey | None = None,
    progress: Progress = lambda name, done, total: None,
) -> list[Input]:
    """List the files and shards to predict; no image is decoded, of DICOM files the header is read.

    Args:
        key: hides the paths and studies of DICOM files.

    Raises:
        UsageError: a path does not exist, a folder is empty or contains a link to the outside, shards have another
            image size, a file is named twice, or there are DICOM files and no key.
    """
    key = key or PatientKey(None)
    key.keep_out_of(paths)
    inputs = [_find_input(path, image_size, key, progress, several=len(paths) > 1) for path in paths]
    counts = Counter(f"{one.root}/{path}" for one in inputs for path in one.files or [""])
    if duplicate := next((name for name, count in counts.items() if count > 1), None):
        raise UsageError(
            f"--data: {duplicate.rstrip('/')!r} is named twice. Name each folder once, and none inside another."
        )
    return inputs


def _find_input(path: StoragePath, image_size: int, key: PatientKey, progress: Progress, *, several: bool) -> Input:
    if path.is_file():
        folder = path.parent
        listed = {path.name: ListedFile(path.filesystem.get_file_info(path.path).size, 0)}
        headers = read_headers(folder, [path.name], progress)
        if headers:  # its folder may be called like its patient
            named = _name_files(listed, {}, headers, {path.name: str(path)}, key)
            return Input(folder, "", named, is_single_file=True)
        return Input(folder, f"{folder}/" if several else "", _name_files(listed, {}, {}, {}, key), is_single_file=True)
    prefix = f"{str(path).rstrip('/')}/" if several else ""
    if all((path / name).is_file() for name in (MANIFEST, FILES)):
        dataset = read_dataset(path)
        if dataset.image_size != image_size:
            raise UsageError(
                f"--data {path}: the model takes images of {image_size} pixels; these shards have "
                f"{dataset.image_size}. Name the radiographs that they were made from instead."
            )
        return Input(path, prefix, dataset=dataset)
    listed = {name: file for name, file in list_files(path, key, _ADVICE).items() if not is_clutter(name)}
    reasons = {name: reason for name in listed if (reason := find_reason(name))}
    headers = read_headers(path, [name for name in listed if name not in reasons], progress)
    return Input(path, prefix, _name_files(listed, reasons, headers, {name: name for name in listed}, key))


def _name_files(
    listed: Mapping[str, ListedFile],
    left_out: Mapping[str, str],
    headers: Mapping[str, DicomHeader],
    hidden: Mapping[str, str],
    key: PatientKey,
) -> dict[str, InputFile]:
    """Name the files for the results, number their studies, and say which are no radiographs; in order of the names.

    Args:
        left_out: path -> why its name says that it is no radiograph.
        hidden: path -> what is hidden and kept in the private table, where there are DICOM files.
    """
    if headers:
        names = {path: key.hide("path", hidden[path]) for path in listed}
        key.write_paths({names[path]: hidden[path] for path in listed})
        key.write_studies((header.study, header.accession) for header in headers.values())
    else:
        names = name_files(listed, key, is_private=False)
    files: dict[str, InputFile] = {}
    for path, file in listed.items():
        if header := headers.get(path):
            patient, study = key.hide("patient", normalise_id(header.patient)), key.hide("study", header.study)
            ids = tuple(filter(None, (patient, study)))
            files[path] = InputFile(names[path], file.size, number_study(study), ids, header.why_left_out)
        else:
            files[path] = InputFile(names[path], file.size, None, left_out=left_out.get(path, ""))
    return dict(sorted(files.items(), key=lambda item: item[1].name))


def check_output(out: StoragePath, inputs: Sequence[Input]) -> None:
    """Check the path of the results before the prediction, which may take hours, and that it can be written.

    Raises:
        UsageError: the format of `out` is unknown, or `out` is a folder or inside the data, or may not be written.
        RunError: the disk is full, or the store fails.
    """
    if not out.name.lower().endswith(_SUFFIXES):
        raise UsageError(f"--out {out}: the ending of the name chooses the format. Use {' or '.join(_SUFFIXES)}.")
    if out.is_dir() or "/" not in out.path:  # a bucket, there or not
        raise UsageError(f"--out {out}: is a folder. Name a file in it, such as {out / 'predictions.csv'}.")
    check_outside("--out", out, inputs)
    try:
        out.parent.check_writable()
    except UsageError as error:
        raise UsageError(f"--out {out}: {error}") from None


def check_outside(flag: str, out: StoragePath, inputs: Sequence[Input]) -> None:
    """Raise UsageError where a file or folder, given with `flag`, is inside the data, where nothing is ever written."""
    for one in inputs:
        data = _real_path(one.root / next(iter(one.files)) if one.is_single_file else one.root)
        if out.is_local == one.root.is_local and _real_path(out).startswith(data):
            raise UsageError(
                f"{flag} {out}: is inside the data, {one.root}, which is never written to. Name another folder."
            )


def _real_path(path: StoragePath) -> str:
    return f"{os.path.realpath(path.path) if path.is_local else path.path}/"


def predict(
    bundle: Bundle,
    inputs: Sequence[Input],
    progress: Progress = lambda name, done, total: None,
    *,
    gpu: bool = False,
    verbose: bool = False,
    block_rows: int = BLOCK_ROWS,
) -> pa.Table:
    """Predict every file or row of the inputs, in their order. Ray must be running.

    On CPUs one process per core reads, decodes and scores, since separate stages would compete for the cores. With
    `gpu` the CPUs read and decode, and one process per GPU scores.

    Returns:
        A table of `RESULTS`.

    Raises:
        UsageError, RunError: a bundle or shard is damaged, there is no GPU, or a store or folder does not answer.
    """
    import ray
    import ray.data

    total, trained_on = sum(map(len, inputs)), bundle.read_trained_on()
    blocks = list(plan_blocks(inputs, block_rows))
    # Every process gets a copy, so without the names of the files.
    slim = [Input(one.root, one.prefix, dataset=one.dataset) for one in inputs]
    with ray.data.DataContext.current(_create_context(verbose)):
        data = _pipeline(ray.data.from_arrow(blocks), len(blocks), bundle, slim, ray.cluster_resources(), gpu)
        tables, done = [RESULTS.empty_table()], 0
        try:
            for table in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                tables.append(find_seen(table, trained_on).cast(RESULTS))
                done += len(table)
                progress("predict", done, total)
        except Exception as error:
            raise (explain_error(error) or error) from error
    if done != total:
        raise RunError(f"{done:,} results for {total:,} files. Run the same command again")
    return pa.concat_tables(tables).combine_chunks()


def find_seen(scored: pa.Table, trained_on: Collection[bytes]) -> pa.Table:
    """Return rows with their marks as rows that say whether the file was seen, by the marks of what was trained on."""
    seen = [None if marks is None else any(m in trained_on for m in marks) for marks in scored["marks"].to_pylist()]
    return scored.set_column(scored.column_names.index("marks"), "seen", pa.array(seen, pa.bool_()))


def _create_context(verbose: bool) -> Any:
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = context.enable_progress_bars = verbose
    context.print_on_execution_start = verbose
    context.raise_original_map_exception = True  # otherwise the cause of Ray Data's error is lost
    if not verbose:
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # `predict` reports errors in one line
    return context


def plan_blocks(inputs: Sequence[Input], block_rows: int) -> Iterator[pa.Table]:
    """Yield tables of one row, each a block for `BlockReader`. A block has files or rows of one input and one split."""
    for number, one in enumerate(inputs):
        for split in one.dataset.splits if one.dataset else ():
            rows = one.dataset.rows(split)
            for start in range(0, rows, block_rows):
                yield _block(input=number, split=split, start=start, stop=min(start + block_rows, rows))
        paths = list(one.files)
        for start in range(0, len(paths), block_rows):
            block = paths[start : start + block_rows]
            names, sizes, studies, ids, left_out = zip(*(one.files[path] for path in block), strict=True)
            columns = {"names": names, "sizes": sizes, "studies": studies, "ids": ids, "left_out": left_out}
            yield _block(input=number, split="", start=start, paths=[os.fsencode(path) for path in block], **columns)


def _block(**columns: Any) -> pa.Table:
    return pa.Table.from_pylist([columns], schema=_BLOCKS)


def _pipeline(
    blocks: Any, count: int, bundle: Bundle, inputs: list[Input], resources: Mapping[str, float], gpu: bool
) -> Any:
    from ray.data import ActorPoolStrategy

    if gpu and not resources.get("GPU"):
        raise UsageError("--gpu: the cluster has no GPU. Leave it out, or join a cluster that has one.")
    reader = BlockReader(inputs, bundle.image_size, uuid.uuid4().hex)
    one_block: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    if not gpu:
        # A process takes seconds to start, and so does a block of the default network: each gets at least two.
        pool = ActorPoolStrategy(size=max(1, min(int(resources.get("CPU", 1)), -(-count // 2))))
        actor = {"fn_constructor_args": (bundle, reader), "num_cpus": 1}
        return blocks.map_batches(_Scorer, compute=pool, **one_block, **actor)
    images = blocks.map_batches(reader.__call__, **one_block, num_cpus=1)
    pool = ActorPoolStrategy(size=max(1, min(int(resources["GPU"]), count)))
    # No CPU, since decoding needs them all.
    actor = {"fn_constructor_args": (bundle, None), "num_cpus": 0, "num_gpus": 1}
    return images.map_batches(_Scorer, compute=pool, batch_size=GPU_BATCH_SIZE, batch_format="pyarrow", **actor)


class BlockReader:
    """Reads and decodes a block: one row per image, with path, image (null if it cannot be read), marks and error."""

    def __init__(self, inputs: list[Input], size: int, job: str) -> None:
        self._inputs, self._size, self._job = inputs, size, job

    def __call__(self, blocks: pa.Table) -> pa.Table:
        [block] = blocks.to_pylist()
        one = self._inputs[block["input"]]
        if block["split"]:
            table = one.dataset.read(block["split"], block["start"], block["stop"])
            images, hashes = table["image"].combine_chunks(), table["sha256"].to_pylist()
            names, studies, errors = table["source"].to_pylist(), table["study_id"], [None] * len(table)
            ids: list[list[str]] = [[]] * len(table)
        else:
            decoded, hashes, errors = self._decode(one.root, block)
            images = pa.array(decoded, pa.binary(self._size**2))
            names, studies, ids = block["names"], pa.array(block["studies"], pa.int64()), block["ids"]
        columns = {
            "path": pa.array([one.prefix + name for name in names], pa.string()),
            "study_id": studies,
            "image": images,
            "marks": pa.array(map(_list_marks, images, hashes, ids), _SCORED.field("marks").type),
            "error": pa.array(errors, pa.string()),
        }
        return pa.table(columns)

    def _decode(
        self, root: StoragePath, block: Mapping[str, Any]
    ) -> tuple[list[bytes | None], list[bytes], list[str | None]]:
        """Return the pixels of each file, its SHA-256, and why it has no pixels."""
        images: list[bytes | None] = []
        hashes: list[bytes] = []
        errors: list[str | None] = []
        files = list(zip(map(os.fsdecode, block["paths"]), block["sizes"], block["left_out"], strict=True))
        name = f"fracture-{self._job}-{block['input']}-{block['start']}"
        with _CrashLog(Path(tempfile.gettempdir(), name)) as crash_log, ThreadPoolExecutor(_READ_AHEAD) as threads:
            reader = _ReadAhead(root, [(path, size) for path, size, left_out in files if not left_out], threads)
            for number, (_, _, left_out) in enumerate(files):
                image, digest, reason = None, b"", None
                try:
                    if left_out:
                        reason = f"{LEFT_OUT}{left_out}"
                    else:
                        image, digest = self._decode_next(reader, number, crash_log)
                except Rejected as error:
                    reason = str(error)
                except MemoryError:
                    reason = "needs more memory than is free"
                images.append(image)
                hashes.append(digest)
                errors.append(reason)
        return images, hashes, errors

    def _decode_next(self, reader: "_ReadAhead", number: int, crash_log: "_CrashLog") -> tuple[bytes, bytes]:
        data = reader.read_next()  # first, since a file that is skipped has its turn too
        crash_log.begin(number)
        pixels = decode(data, self._size).pixels
        if is_blank(pixels):
            raise Rejected("blank: hardly any range of grey")
        return pixels.tobytes(), hashlib.sha256(data).digest()


def _list_marks(image: pa.Scalar, sha256: bytes, ids: Sequence[str]) -> list[bytes] | None:
    """Return what marks a file, as in the bundle's table of what it was trained on; None if it cannot be read."""
    return [sha256, *list_marks(hash_pixels(image.as_py()), ids, "")] if image.is_valid else None


def read_file(root: StoragePath, path: str, size: int) -> bytes:
    """Read a file below `root`.

    Raises:
        Rejected: the file is too large, no longer exists or may not be read, but its folder can be read.
        UsageError, RunError: the folder or the store cannot be read either.
    """
    check_file_size(size)
    try:
        return (root / path).read_bytes()
    except (OSError, UsageError):
        if root.is_dir():
            raise Rejected("cannot be opened") from None
    raise RunError(
        f"{root} does not exist any more, or not on every machine of the Ray cluster. Mount it on all of them, or "
        "name a bucket; then run the same command again."
    )


class _ReadAhead:
    """Reads files in order. While one is decoded, threads read the next few, of at most `_READ_AHEAD_BYTES` with it."""

    def __init__(self, root: StoragePath, files: Iterable[tuple[str, int]], threads: ThreadPoolExecutor) -> None:
        self._root, self._files, self._threads = root, deque(files), threads  # path and bytes of those not begun
        self._begun: deque[tuple[Future[bytes], int]] = deque()

    def read_next(self) -> bytes:
        """Return the next file. The caller has decoded the one before, and holds it no more.

        Raises:
            Rejected, UsageError, RunError: see `read_file`.
        """
        held = sum(size for _, size in self._begun)
        while self._files and len(self._begun) <= _READ_AHEAD:
            path, size = self._files[0]
            held += size
            if self._begun and held > _READ_AHEAD_BYTES:
                break
            self._files.popleft()
            self._begun.append((self._threads.submit(read_file, self._root, path, size), size))
        future, _ = self._begun.popleft()
        return future.result()


class _CrashLog:
    """A file on the machine's disk that names the file being decoded, and those at which the process crashed.

    Ray restarts a block whose process died, without a limit. If a decoder crashes the process, no exception is raised,
    but the log remains. After `_MAX_CRASHES` at the same file that file is skipped.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._crashes = file.read_text().split() if file.exists() else []

    def __enter__(self) -> "_CrashLog":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.unlink(missing_ok=True)

    def begin(self, number: int) -> None:
        """Record that a file is being decoded.

        Raises:
            Rejected: the process crashed at this file too often.
        """
        if self._crashes.count(str(number)) >= _MAX_CRASHES:
            raise Rejected("crashes the decoder")
        self._file.write_text(" ".join([*self._crashes, str(number)]))


class _Scorer:
    """Scores a block, or without a reader a table of images; returns rows of `_SCORED`."""

    def __init__(self, bundle: Bundle, reader: BlockReader | None) -> None:
        self._bundle, self._reader = bundle, reader

    @cached_property
    def _model(self) -> Any:
        # Loaded with the first block and not in the constructor, which Ray would retry forever if it failed.
        limit_devices(1 if self._reader else None, gpu=not self._reader)  # on CPUs, one process per core
        return self._bundle.build_measured_network()

    def __call__(self, table: pa.Table) -> pa.Table:
        images = self._reader(table) if self._reader else table
        readable = images["image"].is_valid()
        values = np.full((len(images), 2), np.nan, np.float32)
        if pc.any(readable).as_py():
            pixels = images_of(images.filter(readable), self._bundle.image_size)
            values[readable.to_numpy()] = run_in_batches(self._model, pixels)
        (probabilities, distances), operating_point = values.T, self._bundle.operating_point
        is_unlike = distances > 1  # false where there is no distance
        fractured = probabilities >= operating_point.threshold  # in float32, as evaluation compares
        outcomes = name_outcomes(probabilities, operating_point, is_unlike)
        decisions = [CLASS_NAMES[FRACTURE if called else 1 - FRACTURE] for called in fractured]
        missing = pc.invert(readable).to_numpy()
        columns = {
            "path": images["path"],
            "study_id": images["study_id"],
            "probability": pa.array(probabilities, pa.float32(), mask=missing),
            "decision": pa.array(decisions, pa.string(), mask=missing),
            "outcome": pa.array(outcomes.tolist(), pa.string(), mask=missing),
            "unlike": pa.array(is_unlike, mask=np.isnan(distances)),
            "distance": pa.array(distances, pa.float32(), mask=np.isnan(distances)),
            "marks": images["marks"],
            "error": images["error"],
        }
        return pa.table(columns, schema=_SCORED)


def join_by_study(results: pa.Table, operating_point: OperatingPoint, rule: str) -> pa.Table:
    """Join rows of `RESULTS` to one row a study, `STUDIES`, in the order in which the studies come.

    An image whose study is not known has a row of its own. What is left out has none, unless it is all of a study.

    Args:
        rule: "max" or "mean", how the probabilities of a study's images are joined.

    Raises:
        UsageError: of no row the study is known.
    """
    if results["study_id"].null_count == len(results):
        raise UsageError(
            "--by study: nothing says which study an image is of. DICOM files and shards made of them do; leave it out."
        )
    studies: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for row in results.to_pylist():
        if row["study_id"] is not None:
            studies.setdefault(("study", row["study_id"]), []).append(row)
        elif not _is_left_out(row):
            studies["image", row["path"]] = [row]
    joined = [join_study(rows, operating_point, rule) for rows in studies.values()]
    return pa.Table.from_pylist(joined, schema=STUDIES)


def join_study(rows: list[dict[str, Any]], operating_point: OperatingPoint, rule: str) -> dict[str, Any]:
    """Join the rows of one study to a row of `STUDIES`; see `join_by_study`."""
    images = [row for row in rows if not _is_left_out(row)]
    readable = [row for row in images if row["error"] is None]
    joined = {"study_id": rows[0]["study_id"], "images": len(images), "unreadable": len(images) - len(readable)}
    if not readable:
        first = (images or rows)[0]
        return joined | {"path": first["path"], "error": first["error"]}
    values = np.array([row["probability"] for row in readable], np.float32)
    probability = values.max() if rule == "max" else values.mean()
    outcomes, unlike = np.array([row["outcome"] for row in readable]), [row["unlike"] for row in readable]
    # Images may all be in doubt since they are unlike the training images as a whole; see `put_in_doubt`.
    is_unlike = np.array([any(unlike) or {*outcomes.tolist()} == {DOUBT}])
    of_one = np.zeros(len(outcomes), np.int64)
    (outcome,) = join_outcomes(outcomes, of_one, np.array([probability]), operating_point, is_unlike, rule).tolist()
    return joined | {
        "path": readable[int(values.argmax())]["path"],
        "probability": float(probability),
        "decision": CLASS_NAMES[FRACTURE if probability >= operating_point.threshold else 1 - FRACTURE],
        "outcome": outcome,
        "unlike": None if None in unlike else any(unlike),
        "seen": any(row["seen"] for row in readable),
    }


def are_unlike_as_a_whole(results: pa.Table, space: FeatureSpace | None) -> bool:
    """Say whether the images of `RESULTS` that are new to the model are unlike its training images as a whole."""
    return are_unlike(_distances_of_new(results), space)


def _distances_of_new(results: pa.Table) -> np.ndarray:
    return results.filter(pc.invert(results["seen"]))["distance"].drop_null().to_numpy()


def put_in_doubt(results: pa.Table) -> pa.Table:
    """Return rows of `RESULTS` with doubt in place of every outcome."""
    outcomes = pc.if_else(results["outcome"].is_valid(), DOUBT, pa.scalar(None, pa.string()))
    return results.set_column(results.column_names.index("outcome"), "outcome", outcomes)


def _is_left_out(row: Mapping[str, Any]) -> bool:
    return (row["error"] or "").startswith(LEFT_OUT)


def explain_error(error: BaseException) -> RunError | UsageError | None:
    """Return the one-line error for an exception of Ray Data; None for a bug in this program."""
    from ray.exceptions import RayError

    for kind in (RunError, UsageError):
        if isinstance(error, kind):  # or Ray's subclass of it, whose text has the traces of all processes
            return kind(str(getattr(error, "cause", error)).partition("\nFailed to apply UDF")[0])
    if isinstance(error, RayError):
        reason = str(error).strip().rpartition("\n")[2]
        return RunError(f"Ray Data gave up: {reason}. Nothing was written. Run again with -v for the traces")
    return None


def write_results(out: StoragePath, results: pa.Table, facts: Mapping[str, str]) -> None:
    """Write the results atomically; in Parquet the facts are the schema's metadata, in CSV `show_id` writes the ids.

    A path that begins like a formula is written unchanged, or it would not be the path; see `count_formula_paths`.
    """
    if out.name.lower().endswith(".parquet"):
        out.write_parquet(results.replace_schema_metadata(dict(facts)))
        return
    ids = [None if number is None else show_id(number) for number in results["study_id"].to_pylist()]
    column = results.column_names.index("study_id")
    sink = pa.BufferOutputStream()
    csv.write_csv(results.set_column(column, "study_id", pa.array(ids, pa.string())), sink)
    out.write_bytes(sink.getvalue())


def count_formula_paths(results: pa.Table) -> int:
    """Count the paths that a spreadsheet would run as formulas."""
    return sum(path.startswith(_FORMULA) for path in results["path"].to_pylist())


def summarize(results: pa.Table, operating_point: OperatingPoint, space: FeatureSpace | None = None) -> list[str]:
    """Return the lines that summarize the results on the screen.

    Args:
        space: that the distances are of.
    """
    called = Counter(results["decision"].to_pylist())
    counts = ", ".join(f"{called[name]:,} {name}" for name in reversed(CLASS_NAMES))
    lines = [f"called     {counts}; a fracture from a probability of {operating_point.threshold:.3g} on"]
    outcomes = Counter(results["outcome"].to_pylist())
    counts = ", ".join(f"{outcomes[name]:,} {name}" for name in OUTCOMES)
    surely = operating_point.fracture_threshold
    why = "the bundle is of an earlier version, without doubt" if surely is None else f"no doubt from {surely:.3g} on"
    if are_unlike_as_a_whole(results, space):
        why = "as a whole the images are unlike the training images"
    lines.append(f"outcome    {counts}; {why}")
    known = results["unlike"].drop_null()
    if len(known):
        unlike = pc.sum(known).as_py()
        lines.append(
            f"unlike     {unlike:,} of {len(known):,} images ({unlike / len(known):.1%}) are unlike the training "
            "images, and in doubt; of new ones of the same kind about 1% are"
        )
        lines += [f"           {line}" for line in describe_distances(_distances_of_new(results), space)]
    elif any(error is None for error in results["error"].to_pylist()):
        lines.append("unlike     not measured: the bundle is of an earlier version, or had too few training images")
    if seen := pc.sum(results["seen"]).as_py():
        lines.append(
            f"seen       {seen:,} files: the model was trained or validated on them, or on images of their patient or "
            "study; how it does on these says nothing about new ones"
        )
    errors = results["error"].drop_null().to_pylist()
    left_out = Counter(error.removeprefix(LEFT_OUT) for error in errors if error.startswith(LEFT_OUT))
    lines += [f"left out   {count:,} file{'s' if count > 1 else ''}: {why}" for why, count in left_out.most_common()]
    reasons = Counter(error.partition(":")[0] for error in errors if not error.startswith(LEFT_OUT))
    if reasons:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(3))
        more = f", {len(reasons) - 3} more reasons" if len(reasons) > 3 else ""
        lines.append(f"unreadable {reasons.total():,} files, named with an error each: {listed}{more}")
    return lines
