"""The answer that goes back into the archive: a report of each study and captures of its images, in DICOM, and sending.

Whoever imports this package needs the extra `archive`.
"""

from fracture.errors import UsageError

try:
    import dicomweb_client  # noqa: F401
    import highdicom  # noqa: F401
    import pydicom  # noqa: F401
    import pynetdicom  # noqa: F401
except ModuleNotFoundError as error:
    raise UsageError(
        f"answers in DICOM need {error.name}, which is not installed here: pip install 'fracture[archive]'"
    ) from None
