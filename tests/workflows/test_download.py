import sys
from types import SimpleNamespace

import pytest

from fracture.errors import RunError, UsageError
from fracture.workflows.download import HANDLE, download


class KaggleError(Exception):
    pass


@pytest.fixture
def kaggle(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for kagglehub, which tests may not reach."""
    names = ("BackendError", "CredentialError", "DataCorruptionError", "UnauthenticatedError")
    hub = SimpleNamespace(dataset_download=lambda handle, output_dir: None)
    monkeypatch.setitem(sys.modules, "kagglehub", hub)
    exceptions = SimpleNamespace(**dict.fromkeys(names, KaggleError))
    monkeypatch.setitem(sys.modules, "kagglehub.exceptions", exceptions)
    return hub


def test_the_set_gets_a_folder_of_its_own(kaggle):
    calls = []
    kaggle.dataset_download = lambda handle, output_dir: calls.append((handle, output_dir))
    assert str(download("data")) == "data/fracture-multi-region-x-ray-data"
    assert calls == [(HANDLE, "data/fracture-multi-region-x-ray-data")]


def test_a_failure_of_kaggle_is_one_line(kaggle):
    def fail(handle: str, output_dir: str) -> None:
        raise KaggleError("401")

    kaggle.dataset_download = fail
    with pytest.raises(RunError, match=f"Kaggle did not deliver {HANDLE}: 401"):
        download("data")


def test_without_kagglehub_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(UsageError, match="downloading needs kagglehub, which is not installed here: pip install kaggl"):
        download("data")
