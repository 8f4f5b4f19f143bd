"""Download the public Kaggle set "Fracture Multi-Region X-Ray Data"."""

from pathlib import Path

from fracture.errors import RunError, UsageError

HANDLE = "bmadushanirodrigo/fracture-multi-region-x-ray-data"


def download(out: str) -> Path:
    """Download the set into a folder of its own in `out`, and return that folder.

    Raises:
        UsageError: kagglehub is not installed.
        RunError: Kaggle did not deliver the set.
    """
    try:
        import kagglehub
        from kagglehub.exceptions import BackendError, CredentialError, DataCorruptionError, UnauthenticatedError
    except ModuleNotFoundError as error:
        raise UsageError(
            f"downloading needs {error.name}, which is not installed here: pip install kagglehub"
        ) from None

    failures = (OSError, ValueError, BackendError, CredentialError, DataCorruptionError, UnauthenticatedError)
    folder = Path(out) / HANDLE.rsplit("/", 1)[1]
    try:
        kagglehub.dataset_download(HANDLE, output_dir=str(folder))
    except failures as error:
        raise RunError(f"Kaggle did not deliver {HANDLE}: {error}") from None
    return folder
