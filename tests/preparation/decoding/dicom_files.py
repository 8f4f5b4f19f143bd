"""DICOM made for tests: a radiograph in any transfer syntax that can be encoded here, and what else an export holds."""

import io
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import openjpeg
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

DX = "1.2.840.10008.5.1.4.1.1.1.1"
CR = "1.2.840.10008.5.1.4.1.1.1"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"

_GDCM = {
    JPEGLossless: gdcm.TransferSyntax.JPEGLosslessProcess14,
    JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    JPEGExtended12Bit: gdcm.TransferSyntax.JPEGExtendedProcess2_4,
}
_J2K = {JPEG2000Lossless, JPEG2000, HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL}
NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
LOSSLESS = (*NATIVE, RLELossless, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless)


def radiograph(bits: int = 12, side: int = 64) -> np.ndarray:
    """Return a bone on a background, [side, side] uint16, whose values are from 0 to 2**bits - 1."""
    y, x = np.mgrid[:side, :side] / (side - 1)
    bone = np.exp(-(((x - 0.5) / 0.15) ** 2)) * (0.6 + 0.4 * np.sin(3 * y))
    values = 0.15 + 0.3 * y + 0.55 * bone + 0.02 * np.random.default_rng(0).random((side, side))
    values = (values - values.min()) / np.ptp(values)
    return np.round(values * (2**bits - 1)).astype(np.uint16)


def dataset(values: np.ndarray, bits: int = 12, **elements: Any) -> Dataset:
    """Return a radiograph that is not compressed; an element of None is left out."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID, made.StudyInstanceUID = DX, "1.2.3.4", "1.2.3"
    made.Rows, made.Columns = values.shape[:2]
    made.SamplesPerPixel = 1 if values.ndim == 2 else values.shape[2]
    made.PhotometricInterpretation = "MONOCHROME2" if values.ndim == 2 else "RGB"
    if values.ndim == 3:
        made.PlanarConfiguration = 0
    made.BitsAllocated = 8 * values.dtype.itemsize
    made.BitsStored, made.HighBit = bits, bits - 1
    made.PixelRepresentation = int(values.dtype.kind == "i")
    made.PixelData = values.tobytes() + b"\0" * (values.nbytes % 2)
    made["PixelData"].VR = "OW" if values.dtype.itemsize > 1 else "OB"
    for keyword, value in elements.items():
        if value is None:
            delattr(made, keyword)
        else:
            setattr(made, keyword, value)
    return made


def encoded(made: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    """Return the file; `syntax` is one of those that are not compressed, RLE or JPEG-LS."""
    if syntax in (RLELossless, JPEGLSLossless, JPEGLSNearLossless):
        made.compress(syntax, generate_instance_uid=False, **({"jls_error": 2} if syntax == JPEGLSNearLossless else {}))
    made.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian and made.BitsAllocated == 16:
        made.PixelData = np.frombuffer(made.PixelData, "<u2").astype(">u2").tobytes()
    file = io.BytesIO()
    if syntax in NATIVE:
        dcmwrite(file, made, enforce_file_format=True, overwrite=True)
    else:
        made["PixelData"].VR = "OB"
        dcmwrite(file, made, enforce_file_format=True)
    return file.getvalue()


def compressed(made: Dataset, syntax: str, folder: Path) -> bytes:
    """Return the file in any transfer syntax that can be encoded here."""
    if syntax in _GDCM:
        return _transcode(encoded(made), syntax, folder)
    if syntax in _J2K or syntax == JPEGBaseline8Bit:
        made.PixelData = encapsulate([_encode_frame(made, syntax)])
    return encoded(made, syntax)


def _encode_frame(made: Dataset, syntax: str) -> bytes:
    values = np.frombuffer(made.PixelData, f"u{made.BitsAllocated // 8}")[: made.Rows * made.Columns]
    values = values.reshape(made.Rows, made.Columns)
    if syntax in _J2K:  # a codestream without HT blocks, too, is for a decoder of HTJ2K to read
        ratios = {"compression_ratios": [4]} if syntax == JPEG2000 else {}
        return openjpeg.utils.encode_array(values, bits_stored=made.BitsStored, photometric_interpretation=2, **ratios)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "jpeg", quality=95)
    return file.getvalue()


def _transcode(data: bytes, syntax: str, folder: Path) -> bytes:
    source, target = folder / "source.dcm", folder / "target.dcm"
    source.write_bytes(data)
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(source))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(_GDCM[syntax]))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    assert dcmread(target).file_meta.TransferSyntaxUID == syntax
    return target.read_bytes()
