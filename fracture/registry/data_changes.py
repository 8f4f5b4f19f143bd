"""What has come into a data set since the model in use was trained, and whether it is of the same kind."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa

from fracture.labels import CLASS_NAMES, FRACTURE, NORMAL

CHANCE = 1e-3  # a difference that comes about by chance more often than this is none
_SHOWN = 5  # paths of conflicts


@dataclass(frozen=True)
class Drift:
    """One measure of the new radiographs beside those before."""

    name: str
    before: np.ndarray  # [radiographs] float64
    now: np.ndarray

    @cached_property
    def _test(self) -> tuple[float, float]:
        from scipy.stats import ks_2samp

        found = ks_2samp(self.before, self.now)
        return float(found.statistic), float(found.pvalue)

    @property
    def distance(self) -> float:
        """Kolmogorov-Smirnov's: the largest difference of the two cumulative distributions, in 0 to 1."""
        return self._test[0]

    @property
    def by_chance(self) -> bool:
        return self._test[1] > CHANCE


@dataclass(frozen=True)
class DataChanges:
    """All counts are of what is new; a radiograph is new if none of its files was known."""

    images: dict[str, int]  # class -> readable
    radiographs: dict[str, int]
    unreadable: int
    gone: int  # files that were there before
    origins: dict[str, int]  # hospital, scanner, collection -> radiographs
    conflicts: int  # radiographs with a file of a label that it did not have, and of another label too, or before
    conflicting: list[str]  # paths of some
    left_test: int  # radiographs that tested the model in use, and do no longer, or are gone
    test_before: int  # radiographs
    share_before: float | None  # of fractures among the radiographs
    share_now: float | None
    drifts: list[Drift] = field(default_factory=list)
    fresh: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # radiographs that are new
    changed: int = 0  # radiographs that are new, or in `conflicts`

    @property
    def count(self) -> int:
        return sum(self.radiographs.values())


def find_data_changes(files: pa.Table, before: pa.Table | None) -> DataChanges:
    """
    Args:
        files: `files.parquet` of the data as it is.
        before: the same of the data that the model in use was trained on; None if there is no such model.
    """
    readable = files["sha256"].is_valid().to_numpy()
    hashes = np.array(files["sha256"].to_pylist(), object)
    radiograph_ids, labels = files["radiograph_id"].to_numpy(), files["label"].to_numpy()
    known_files = set() if before is None else set(before["sha256"].to_pylist())
    labelled = (
        set() if before is None else set(zip(before["sha256"].to_pylist(), before["label"].to_pylist(), strict=True))
    )
    known = np.array([digest in known_files for digest in hashes])
    new = readable & np.array([pair not in labelled for pair in zip(hashes, labels.tolist(), strict=True)])
    old_radiographs = np.unique(radiograph_ids[readable & known])
    fresh = np.setdiff1d(np.unique(radiograph_ids[new]), old_radiographs)
    both = np.intersect1d(
        radiograph_ids[readable & (labels == FRACTURE)], radiograph_ids[readable & (labels == NORMAL)]
    )
    torn = np.union1d(np.intersect1d(both, radiograph_ids[new]), radiograph_ids[new & known])
    paths = np.array(files["path"].to_pylist(), object)
    first = _first_rows(radiograph_ids, readable)
    fresh_rows, old_rows = (first[np.isin(radiograph_ids[first], which)] for which in (fresh, old_radiographs))
    origins = np.array(files["origin"].to_pylist(), object)[fresh_rows]
    known_paths = set() if before is None else set(before["path"].to_pylist())
    share_before, share_now = (_share(labels[rows]) for rows in (old_rows, fresh_rows))
    return DataChanges(
        images=_by_class(labels[new]),
        radiographs=_by_class(labels[fresh_rows]),
        unreadable=sum(path not in known_paths for path in paths[~readable]),
        gone=len(known_paths - set(paths.tolist())),
        origins=dict(Counter(origin or "unknown" for origin in origins).most_common()),
        conflicts=len(torn),
        conflicting=paths[readable & np.isin(radiograph_ids, torn)][:_SHOWN].tolist(),
        left_test=0 if before is None else len(_test_radiographs(before) - _still_in_test(before, files)),
        test_before=0 if before is None else len(_test_radiographs(before)),
        share_before=share_before,
        share_now=share_now,
        drifts=_drifts(files, old_rows, fresh_rows),
        fresh=fresh,
        changed=len(np.union1d(fresh, torn)),
    )


def _in_test(files: pa.Table) -> np.ndarray:
    """[files] bool."""
    return np.array(files["split_used"].to_pylist(), object) == "test"


def _test_radiographs(before: pa.Table) -> set[int]:
    return set(before["radiograph_id"].to_numpy()[_in_test(before)].tolist())


def _still_in_test(before: pa.Table, now: pa.Table) -> set[int]:
    """Radiographs of before of which an image, by its pixels, belongs to a radiograph that is in test now."""
    radiograph_ids = now["radiograph_id"].to_numpy()
    in_test = np.isin(radiograph_ids, radiograph_ids[_in_test(now)])
    pixels = {image for image, there in zip(now["pixels"].to_pylist(), in_test, strict=True) if there}
    pairs = zip(before["radiograph_id"].to_pylist(), before["pixels"].to_pylist(), strict=True)
    return {radiograph_id for radiograph_id, image in pairs if image is not None and image in pixels}


def _first_rows(radiograph_ids: np.ndarray, readable: np.ndarray) -> np.ndarray:
    """One row of each radiograph."""
    rows = np.flatnonzero(readable)
    return rows[np.unique(radiograph_ids[rows], return_index=True)[1]]


def _by_class(labels: np.ndarray) -> dict[str, int]:
    return {name: int((labels == label).sum()) for label, name in enumerate(CLASS_NAMES)}


def _share(labels: np.ndarray) -> float | None:
    return float((labels == FRACTURE).mean()) if len(labels) else None


def _drifts(files: pa.Table, old_rows: np.ndarray, fresh_rows: np.ndarray) -> list[Drift]:
    if not (len(old_rows) and len(fresh_rows)):
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
    return [Drift(name, values[old_rows], values[fresh_rows]) for name, values in measures.items()]
