"""Tiny data and small helpers that many tests share."""

import os
import subprocess
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fracture.config import Config, load_config
from fracture.dataset.format import MANIFEST, SCHEMA_VERSION, Dataset, Leak, Manifest, Pixels, Shard, encode_shard
from fracture.labels import CLASS_NAMES, SPLITS
from fracture.storage import StoragePath, storage_path
from tests.web_hook import Hook

TINY = (
    "data.image_size=32",
    "model.filters=[4,8]",
    "model.dense=[8]",
    "training.batch_size=8",
    "training.precision=float32",
)


@pytest.fixture
def tiny_config() -> Callable[..., Config]:
    """A network of two small blocks; more settings as `key=value`."""
    return lambda *assignments: load_config(None, [*TINY, *assignments])


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes small grey images at the given paths, each of its own pixels, and returns the folder."""

    def write(*paths: str, root: str = "data") -> Path:
        for number, path in enumerate(paths):
            file = tmp_path / root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (40, 36), np.uint8)
            Image.fromarray(pixels).save(file, "png")
        return tmp_path / root

    return write


def official_paths(per_class: int = 2, classes: tuple[str, str] = ("fractured", "not fractured")) -> list[str]:
    """Paths of a complete tree, as the Kaggle set has it."""
    return [f"{split}/{name}/{i}.png" for split in SPLITS for name in classes for i in range(per_class)]


def write_shards(
    folder: StoragePath, rows: dict[str, int], image_size: int = 32, rows_per_shard: int = 50, hash_byte: int = 0
) -> Manifest:
    """Shards whose row `i` is an image with `i % 256` in its first pixel, labels by turns, brighter when 1.

    The first five rows of label 0 are of one radiograph and group, each other row is of its own.

    Args:
        rows: of each split; splits called `fold-N` are folds.
        hash_byte: of every file's hash.
    """
    shards: dict[str, list[Shard]] = {}
    files: dict[str, list[Any]] = {"sha256": [], "group_id": []}  # and pixels, patients and study
    for number, split in enumerate(rows):
        shards[split] = []
        for start in range(0, rows[split], rows_per_shard):
            numbers = np.arange(start, min(start + rows_per_shard, rows[split]))
            groups = np.where((numbers < 10) & (numbers % 2 == 0), 0, numbers)
            groups += 1000 * number if split.startswith("fold-") else 0
            generator = np.random.default_rng([number, start])
            images = generator.integers(0, 128, (len(numbers), image_size, image_size), np.uint8)
            images += (64 * (numbers % 2)).astype(np.uint8)[:, None, None]
            images[:, 0, 0] = numbers % 256
            content = {
                "label": (numbers % 2).tolist(),
                "radiograph_id": groups.tolist(),
                "group_id": groups.tolist(),
                "study_id": [None] * len(numbers),
                "sha256": [bytes([hash_byte] * 32)] * len(numbers),
                "source": [f"{split}/{n}.png" for n in numbers],
                "origin": [""] * len(numbers),
            }
            for name in files:
                files[name] += content[name]
            data, digest = encode_shard(images, content)
            name = f"{split}-{start // rows_per_shard:05d}-{digest[:12]}.parquet"
            (folder / name).write_bytes(data)
            shards[split].append(Shard(file=name, rows=len(numbers), bytes=data.size, digest=digest))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        fingerprint=f"{rows}",
        synthetic=True,
        split="folds" if "fold-1" in rows else "official",
        split_reason="as found: no radiograph is in two splits",
        folds=[name for name in rows if name.startswith("fold-")],
        parameters={"image_size": image_size, "seed": 0},
        class_folders={name: [name] for name in CLASS_NAMES},
        counts={s: {"normal": (rows[s] + 1) // 2, "fracture": rows[s] // 2} for s in rows},
        groups={s: {"normal": max((rows[s] + 1) // 2 - 4, 1), "fracture": rows[s] // 2} for s in rows},
        leakage={s: Leak(images=rows[s], by_kind={"bytes": 0}) for s in SPLITS[1:] if s in rows},
        leakage_found={},
        alarms=[],
        shortcuts={},
        moved=[],
        left_out={},
        pixels={s: Pixels(count=1000, sum=96_000, square_sum=(96**2 + 50**2) * 1000) for s in rows},
        rejected=[],
        shards=shards,
    )
    types = {"sha256": pa.binary(32), "group_id": pa.int64()}
    columns = {
        name: pa.array([int(v) if name == "group_id" else v for v in files[name]], types[name]) for name in types
    }
    count = len(files["sha256"])
    ids = {
        "pixels": pa.array([bytes([hash_byte] * 16)] * count, pa.binary(16)),
        "patients": pa.array([[]] * count, pa.list_(pa.string())),
        "study": pa.array([""] * count),
    }
    (folder / "files.parquet").write_parquet(pa.table(columns | ids))
    (folder / "ledger.parquet").write_parquet(pa.table({"sha256": columns["sha256"]}))
    (folder / MANIFEST).write_bytes(manifest.model_dump_json().encode())
    return manifest


@pytest.fixture
def shard_folder(tmp_path: Path) -> Callable[..., tuple[StoragePath, Manifest]]:
    def write(train: int = 40, val: int = 16, test: int = 16, **kwargs: int) -> tuple[StoragePath, Manifest]:
        folder = storage_path(tmp_path / "shards")
        return folder, write_shards(folder, {"train": train, "val": val, "test": test}, **kwargs)

    return write


@pytest.fixture
def dataset(shard_folder: Callable[..., tuple[StoragePath, Manifest]]) -> Callable[..., Dataset]:
    """Writes shards and returns them as a Dataset; arguments as of `shard_folder`."""
    return lambda **rows: Dataset(*shard_folder(**rows))


def quick_bundle(folder: Path, *assignments: str) -> Path:
    """A bundle of a network whose weights are drawn, for whoever reads its numbers; no form of it is for others."""
    from fracture.arrays import save_arrays
    from fracture.evaluation.metrics import compute_metrics
    from fracture.evaluation.operating_point import OperatingPoint
    from fracture.inference.bundle import WEIGHTS, write_bundle
    from fracture.models import build_model

    config, shards, bundle = load_config(None, [*assignments]), storage_path(folder / "seen"), folder / "bundle"
    manifest = write_shards(shards, {"train": 40, "val": 16, "test": 16}, image_size=config.data.image_size)
    model = build_model(config, manifest.pixel_mean, manifest.pixel_std)
    generator = np.random.default_rng(0)
    names, shapes = [weight.path for weight in model.weights], [weight.shape for weight in model.weights]
    values = [
        generator.normal(0, (3 / np.prod(shape[:-1])) ** 0.5, shape) if "kernel" in name else value
        for name, shape, value in zip(names, shapes, model.get_weights(), strict=True)
    ]
    bundle.mkdir(parents=True)
    save_arrays(bundle / WEIGHTS, {n: value.astype(np.float32) for n, value in zip(names, values, strict=True)})
    figures = compute_metrics(np.array([0, 1]), np.array([0.2, 0.9]), np.arange(2), 0.4, "image")
    evaluations = {split: {"image": figures, "radiograph": figures} for split in ("val", "test")}
    decision = OperatingPoint(temperature=1.0, offset=0.0, threshold=0.5, rule="given: 0.5")
    about = {"name": "x", "epochs": 3, "best_epoch": 2, "workers": 2, "precision": "float32"}
    write_bundle(storage_path(bundle), config, Dataset(shards, manifest), about, decision, evaluations)
    return bundle


def give_space(bundle: Path) -> None:
    """Give a bundle a feature space to which all images are unlike as a whole, and none alone."""
    from fracture.arrays import save_arrays
    from fracture.evaluation.feature_space import fit_feature_space
    from fracture.inference.bundle import FEATURES, read_bundle
    from fracture.models import add_features

    width = add_features(read_bundle(storage_path(bundle)).build_model()).output[1].shape[-1]
    features = np.random.default_rng(0).normal(size=(60, width)).astype(np.float32)
    arrays = fit_feature_space(features, np.arange(60), np.full(60, "")).arrays()
    arrays["medians"][:], arrays["limit"][:] = 1e-6, 1e12
    save_arrays(bundle / FEATURES, arrays)
    card = storage_path(bundle / "bundle.json")
    shape = {"sources": 1, "components": len(arrays["components"]), "width": width}
    card.write_json(card.read_json() | {"features": shape})


def shell() -> dict[str, str]:
    """The environment as a person's shell has it, without what starting Ray here has set."""
    from fracture.runtime.cluster import ENVIRONMENT, KERAS_ENVIRONMENT, LOCAL_ENVIRONMENT

    ours = {"RAY_ADDRESS", "RAY_DEDUP_LOGS_SKIP_REGEX", *ENVIRONMENT, *KERAS_ENVIRONMENT, *LOCAL_ENVIRONMENT}
    return {name: value for name, value in os.environ.items() if name not in ours}


@contextmanager
def without_rights_to(path: Path, but: int = 0) -> Iterator[None]:
    """Nobody may use the path, except as `but` says; root, who always may, is another user for as long."""
    user = os.geteuid()
    closed = [folder for folder in path.parents if ~folder.stat().st_mode & 0o011] if user == 0 else []  # of pytest
    modes = {file: file.stat().st_mode for file in (path, *closed)}
    path.chmod(but)
    for folder in closed:
        folder.chmod(modes[folder] | 0o011)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for file, mode in modes.items():
            file.chmod(mode)


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of its own that is soon full."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


ROOT = Path(__file__).parents[1]
SECRET = "SECRET/of+the+tests"  # with what secrets do have in them


@dataclass(frozen=True)
class ObjectStore:
    """The S3 server of `object_store.py`."""

    url: str

    def ask(self, method: str, path: str) -> str:
        with urllib.request.urlopen(urllib.request.Request(self.url + path, method=method)) as answer:
            return answer.read().decode()

    def fail(self, times: int, **how: object) -> None:
        """Makes the next requests fail: with a `status` and `code`, or late by so many `seconds`."""
        self.ask("POST", f"/fail?{urlencode({'times': times, **how})}")

    @property
    def failures_left(self) -> int:
        return int(self.ask("GET", "/fail"))


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    python = ROOT / ".venv-s3/bin/python"
    assert python.exists(), "the S3 server of the tests is not installed: make .venv-s3/installed"
    command = [str(python), str(ROOT / "tests/object_store.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        yield ObjectStore(server.stdout.readline().strip())
        server.terminate()


@pytest.fixture
def bucket(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of an empty bucket of a real S3 server, which the standard environment names."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_MAX_ATTEMPTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", object_store.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY-of-the-tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    name = f"test-{uuid.uuid4().hex[:8]}"
    object_store.ask("PUT", f"/{name}")
    yield f"s3://{name}"
    object_store.fail(times=0)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray for all integration tests, promised more CPUs than there are, so that 3 workers fit on 2 cores."""
    import ray

    from fracture.runtime.cluster import start_ray

    os.environ["RAY_OVERRIDE_RESOURCES"] = '{"CPU": 4}'
    start_ray(verbose=False)
    yield
    ray.shutdown()


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
