import argparse
from pathlib import Path

import pytest
from evaluate import find_test

from fracture.errors import UsageError
from fracture.inference.bundle import Bundle, read_bundle
from fracture.storage import storage_path
from tests.conftest import TINY, quick_bundle

NAMED = argparse.Namespace(shards="shards", data=None, labels=None)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return read_bundle(storage_path(quick_bundle(tmp_path / "made", *TINY)))


def test_neither_a_run_nor_a_bundle_is_written_to(bundle, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    for out in (storage_path(tmp_path), bundle.folder):
        with pytest.raises(UsageError, match=r"--out .* is a run or a bundle, whose files would be replaced. Name ano"):
            find_test(NAMED, [bundle], out)


def test_a_model_counts_once(bundle, tmp_path):
    with pytest.raises(UsageError, match=r"--bundle .* is named twice, and would count double. Name it once"):
        find_test(NAMED, [bundle, bundle], storage_path(tmp_path / "out"))
