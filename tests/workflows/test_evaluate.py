from pathlib import Path

import pytest

from fracture.errors import UsageError
from fracture.inference.bundle import Bundle, read_bundle
from fracture.storage import storage_path
from fracture.workflows.evaluate import ScoringArguments, prepare_test_data
from tests.conftest import TINY, quick_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return read_bundle(storage_path(quick_bundle(tmp_path / "made", *TINY)))


def test_neither_a_run_nor_a_bundle_is_written_to(bundle: Bundle, tmp_path: Path):
    (tmp_path / "run.json").write_text("{}")
    for out in (str(tmp_path), str(bundle.folder)):
        with pytest.raises(UsageError, match=r"--out .* is a run or a bundle, whose files would be replaced. Name ano"):
            prepare_test_data(ScoringArguments(shards="shards", out=out), [bundle])


def test_a_model_counts_once(bundle: Bundle, tmp_path: Path):
    arguments = ScoringArguments(shards="shards", out=str(tmp_path / "out"))
    with pytest.raises(UsageError, match=r"--bundle .* is named twice, and would count double. Name it once"):
        prepare_test_data(arguments, [bundle, bundle])


@pytest.mark.parametrize("given", [{}, {"data": ("a",), "shards": "b"}])
def test_either_radiographs_or_shards_are_scored(given: dict):
    with pytest.raises(UsageError, match="give either --data or --shards"):
        ScoringArguments(out="out", **given)
