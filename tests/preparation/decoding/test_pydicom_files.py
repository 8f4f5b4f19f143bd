"""Real DICOM in many encodings: pydicom's own files, each compared with pydicom's own way to the screen."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array

from fracture.preparation.decoding.decode import Rejected, decode
from fracture.preparation.decoding.dicom import render
from tests.preparation.decoding.pydicom_files import list_files, make_table

PAGE = Path(__file__).parents[3] / "docs" / "dicom.md"
REFUSED = {
    "JPEG2000-embedded-sequence-delimiter.dcm": "pixels cannot be decompressed|other sides",
    "MR_truncated.dcm": "truncated",
    "badVR.dcm": "32 bits|cannot be read",
    **dict.fromkeys(("meta_missing_tsyntax.dcm", "nested_priv_SQ.dcm"), "without Rows"),
}
# pydicom alone: 12 bits of lossy JPEG are not decoded; a palette in big endian is read as little endian.
NO_REFERENCE = {"JPEG-lossy.dcm", "JPGExtended.dcm", "OBXXXX1A_expb.dcm", "OBXXXX1A_expb_2frame.dcm"}
FILES = [path for path in list_files() if not path.name.startswith("IM0000")]


def scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.round(np.clip((values - low) / (high - low), 0, 1) * 255)


def show(dataset: Dataset) -> np.ndarray | None:
    """Return the first frame by pydicom's functions, 0 to 255; None where only our own rule says what is white."""
    values = pixel_array(dataset, index=0)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, dataset)[..., :3]
        values = values if values.dtype == np.uint8 else (values >> 8).astype(np.uint8)
    if values.ndim == 3:
        deeper = 8 * (values.dtype.itemsize - 1)
        return np.asarray(Image.fromarray((values >> deeper).astype(np.uint8)).convert("L")).astype(float)
    modality = apply_modality_lut(values, dataset)
    if dataset.get("VOILUTSequence"):
        return scale(apply_voi_lut(modality, dataset), 0, 2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1)
    if "WindowWidth" in dataset:
        low, high = apply_voi_lut(np.array([-1e9, 1e9]), dataset)
        shown = scale(apply_voi_lut(modality, dataset), low, high)
        if np.mean((shown > 0) & (shown < 255)) < 0.01:  # the windows of three CT make all of them white
            return None
        shown = 255 - shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown
        return np.where(values == dataset.get("PixelPaddingValue", 1e9), 0, shown)
    return values.astype(float) if values.dtype == np.uint8 and values.max() > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore")  # pydicom's own, of files made to be odd
def test_each_file_looks_as_pydicom_shows_it(path: Path):
    dataset = dcmread(path)
    if "PixelData" not in dataset:
        with pytest.raises(Rejected, match=r"no radiograph|not an image"):
            decode(path.read_bytes(), 32)
        return
    is_dose = dataset.get("BitsAllocated") == 32 and dataset.SamplesPerPixel == 1
    if is_dose or path.name in REFUSED:
        with pytest.raises(Rejected, match=REFUSED.get(path.name, "DICOM grey of 32 bits, over the limit of 16")):
            render(dataset)
        return
    grey = render(dataset)
    if path.name in NO_REFERENCE:
        assert np.ptp(grey) > 100
        return
    shown = show(dataset)
    if shown is None:
        assert grey.min() == 0
        assert grey.max() == 255
    elif grey.shape != shown.shape:  # pixels that are not square
        assert abs(grey.mean() - shown.mean()) < 1
    else:
        assert np.abs(grey - shown).max() <= 2


def test_the_page_lists_what_becomes_of_each_file():
    assert make_table() in PAGE.read_text(encoding="utf-8"), (
        "python -m tests.preparation.decoding.pydicom_files prints it"
    )
