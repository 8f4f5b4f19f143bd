"""How a dataset differs from that of the model in use: new files, lost files, conflicting labels, and drift."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa

from fracture.labels import CLASS_NAMES, FRACTURE, NORMAL

CHANCE = 1e-3  # a difference with a larger p-value counts as chance
_SHOWN = 5  # paths of conflicting labels


@dataclass(frozen=True)
class Drift:
    """One measure of the new radiographs compared with the earlier ones."""

    name: str
    before: np.ndarray  # [earlier radiographs] float64
    now: np.ndarray  # [new radiographs] float64

    @cached_property
    def _test(self) -> tuple[float, float]:
        from scipy.stats import ks_2samp

        result = ks_2samp(self.before, self.now)
        return float(result.statistic), float(result.pvalue)

    @property
    def distance(self) -> float:
        """Kolmogorov-Smirnov distance: the largest difference of the two cumulative distributions, in [0, 1]."""
        return self._test[0]

    @property
    def is_chance(self) -> bool:
        return self._test[1] > CHANCE


@dataclass(frozen=True)
class DataChanges:
    """Changes since the model in use was trained. A radiograph is new if none of its files was known."""

    new_images: dict[str, int]  # class -> readable files
    new_radiographs: dict[str, int]  # class -> radiographs
    unreadable_files: int  # new files only
    removed_files: int
    origins: dict[str, int]  # hospital, scanner or collection -> new radiographs
    conflicting: int  # new or changed radiographs that have both labels, or a label other than before
    conflicting_paths: list[str]  # a few of their files
    lost_from_test: int  # radiographs of the earlier test split that are no longer in test
    test_before: int  # radiographs of the earlier test split
    fracture_share_before: float | None  # among the earlier radiographs
    fracture_share_now: float | None  # among the new radiographs
    drifts: list[Drift] = field(default_factory=list)
    new_radiograph_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    new_or_conflicting: int = 0  # radiographs

    @property
    def new_radiograph_count(self) -> int:
        return sum(self.new_radiographs.values())


def find_data_changes(files: pa.Table, before: pa.Table | None) -> DataChanges:
    """Compare the files of two datasets.

    Args:
        files: `files.parquet` of the new dataset.
        before: `files.parquet` of the dataset of the model in use; None if there is no such model.
    """
    readable = files["sha256"].is_valid().to_numpy()
    hashes = np.array(files["sha256"].to_pylist(), object)
    radiograph_ids, labels = files["radiograph_id"].to_numpy(), files["label"].to_numpy()
    known_hashes = set() if before is None else set(before["sha256"].to_pylist())
    known_labels = (
        set() if before is None else set(zip(before["sha256"].to_pylist(), before["label"].to_pylist(), strict=True))
    )
    is_known = np.array([digest in known_hashes for digest in hashes])
    is_new = readable & np.array([pair not in known_labels for pair in zip(hashes, labels.tolist(), strict=True)])
    known_ids = np.unique(radiograph_ids[readable & is_known])
    new_ids = np.setdiff1d(np.unique(radiograph_ids[is_new]), known_ids)
    ids_with_both_labels = np.intersect1d(
        radiograph_ids[readable & (labels == FRACTURE)], radiograph_ids[readable & (labels == NORMAL)]
    )
    conflicting_ids = np.union1d(
        np.intersect1d(ids_with_both_labels, radiograph_ids[is_new]),
        radiograph_ids[is_new & is_known],  # the same bytes under another label
    )
    paths = np.array(files["path"].to_pylist(), object)
    first = _first_rows(radiograph_ids, readable)
    new_rows, known_rows = (first[np.isin(radiograph_ids[first], ids)] for ids in (new_ids, known_ids))
    origins = np.array(files["origin"].to_pylist(), object)[new_rows]
    known_paths = set() if before is None else set(before["path"].to_pylist())
    return DataChanges(
        new_images=_count_by_class(labels[is_new]),
        new_radiographs=_count_by_class(labels[new_rows]),
        unreadable_files=sum(path not in known_paths for path in paths[~readable]),
        removed_files=len(known_paths - set(paths.tolist())),
        origins=dict(Counter(origin or "unknown" for origin in origins).most_common()),
        conflicting=len(conflicting_ids),
        conflicting_paths=paths[readable & np.isin(radiograph_ids, conflicting_ids)][:_SHOWN].tolist(),
        lost_from_test=0 if before is None else len(_test_radiographs(before) - _still_in_test(before, files)),
        test_before=0 if before is None else len(_test_radiographs(before)),
        fracture_share_before=_fracture_share(labels[known_rows]),
        fracture_share_now=_fracture_share(labels[new_rows]),
        drifts=_measure_drifts(files, known_rows, new_rows),
        new_radiograph_ids=new_ids,
        new_or_conflicting=len(np.union1d(new_ids, conflicting_ids)),
    )


def _is_in_test(files: pa.Table) -> np.ndarray:  # [files] bool
    return np.array(files["split_used"].to_pylist(), object) == "test"


def _test_radiographs(before: pa.Table) -> set[int]:
    return set(before["radiograph_id"].to_numpy()[_is_in_test(before)].tolist())


def _still_in_test(before: pa.Table, now: pa.Table) -> set[int]:
    """Return the earlier radiographs with an image whose pixels belong to a radiograph of the new test split."""
    radiograph_ids = now["radiograph_id"].to_numpy()
    in_test = np.isin(radiograph_ids, radiograph_ids[_is_in_test(now)])
    pixels = {image for image, is_test in zip(now["pixels"].to_pylist(), in_test, strict=True) if is_test}
    pairs = zip(before["radiograph_id"].to_pylist(), before["pixels"].to_pylist(), strict=True)
    return {radiograph_id for radiograph_id, image in pairs if image is not None and image in pixels}


def _first_rows(radiograph_ids: np.ndarray, readable: np.ndarray) -> np.ndarray:
    """Return one row of each readable radiograph."""
    rows = np.flatnonzero(readable)
    return rows[np.unique(radiograph_ids[rows], return_index=True)[1]]


def _count_by_class(labels: np.ndarray) -> dict[str, int]:
    return {name: int((labels == label).sum()) for label, name in enumerate(CLASS_NAMES)}


def _fracture_share(labels: np.ndarray) -> float | None:
    return float((labels == FRACTURE).mean()) if len(labels) else None


def _measure_drifts(files: pa.Table, known_rows: np.ndarray, new_rows: np.ndarray) -> list[Drift]:
    if not (len(known_rows) and len(new_rows)):
        return []
    width, height, mean, deviation, border = (
        files[name].to_numpy(zero_copy_only=False).astype(float)
        for name in ("width", "height", "mean", "deviation", "border")
    )
    measures = {
        "shorter side, pixels": np.minimum(width, height),
        "width / height": width / height,
        "exposure: mean grey": mean,
        "contrast: deviation of grey": deviation,
        "border: mean grey": border,
    }
    return [Drift(name, values[known_rows], values[new_rows]) for name, values in measures.items()]
