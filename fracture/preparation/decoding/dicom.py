"""Read DICOM: what kind of object a file holds, whom it shows, and its first frame as 8-bit grey.

Decoders: pydicom's own for what is not compressed and RLE; Pillow for JPEG of 8 bits; GDCM for JPEG of 12 bits,
lossless JPEG and JPEG-LS; OpenJPEG for JPEG 2000 and HTJ2K.
No reason for a refusal repeats a value of the file, since any of them may hold a name.
"""

import hashlib
import io
import logging
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from fracture.preparation.decoding.grey import choose_range, count_values, look_up, scale_to_8_bits
from fracture.preparation.decoding.limits import MAX_BYTES, Rejected, check_pixels

if TYPE_CHECKING:  # 0.2 s, which only those pay who have DICOM
    from pydicom.dataset import Dataset

_MAGIC = b"DICM"
_PREAMBLE = 128  # bytes before the magic
_META_LENGTH = _PREAMBLE + 4 + 8  # where the length of the file meta group is stored, 4 bytes

# SOP classes of radiographs, and of objects that may hold one.
_IMAGES = {
    f"1.2.840.10008.5.1.4.1.1.{number}"
    for number in (
        *("1", "1.1", "1.1.1", "1.3", "1.3.1"),  # CR; DX and intra-oral, for presentation and for processing
        *("7", "7.1", "7.2", "7.3", "7.4"),  # secondary capture
        *("12.1", "12.1.1", "12.2", "12.2.1"),  # angiography and fluoroscopy
    )
}
_FOR_PROCESSING = {"1.2.840.10008.5.1.4.1.1.1.1.1", "1.2.840.10008.5.1.4.1.1.1.3.1"}
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# A word of the SOP class's name, and what its objects are called; the first that fits.
_KINDS = {
    "Key Object": "a key object",
    "Encapsulated PDF": "a PDF",
    "Presentation State": "a presentation state",
    "SR Storage": "a report",
    "Text SR": "a report",
    "Media Storage Directory": "a DICOMDIR",
    "CT Image": "CT",
    "MR ": "MR",
    "Ultrasound": "ultrasound",
    "Mammography": "mammography",
    "Breast Tomosynthesis": "mammography",
    "Nuclear Medicine": "nuclear medicine",
    "Positron": "PET",
    "VL ": "a photograph",
    "Photography": "a photograph",
    "Segmentation": "a segmentation",
    "RT ": "a radiotherapy object",
    "Waveform": "a waveform",
}
# Modality (0008,0060) of a secondary capture that shows no radiograph, and of objects without a known SOP class.
_MODALITIES = {
    **{"CT": "CT", "MR": "MR", "US": "ultrasound", "MG": "mammography", "NM": "nuclear medicine", "PT": "PET"},
    **{"SR": "a report", "PR": "a presentation state", "KO": "a key object", "DOC": "a document"},
    **{"XC": "a photograph", "ES": "a photograph", "ECG": "a waveform"},
}
_PREDECESSOR = "121320"  # purpose of a reference to the same image, not yet compressed: DICOM PS3.16, CID 7202
_OWN_NAME = "fracture"  # manufacturer and model of the captures that this program writes
_RADIOGRAPHS = {"CR", "DX", "DR", "RG", "RF", "XA", "IO", "PX"}  # Modality

_HEADER = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "PatientID", "AccessionNumber"),
    *("Modality", "Manufacturer", "ManufacturerModelName", "DetectorType", "KVP", "BodyPartExamined", "ViewPosition"),
    *("ImageLaterality", "Laterality", "PatientAge", "PatientBirthDate", "StudyDate", "PatientSex"),
    *("BurnedInAnnotation", "PresentationIntentType", "NumberOfFrames", "SourceImageSequence"),
)
_DETECTORS = {"DIRECT", "SCINTILLATOR", "STORAGE", "FILM"}
_VIEWS = {
    *("AP", "PA", "LL", "RL", "RLD", "LLD", "RLO", "LLO", "LAT", "LATERAL", "OBL", "OBLIQUE", "AX", "AXIAL"),
    *("TAN", "TANGENTIAL", "LPO", "RPO", "LAO", "RAO", "SUNRISE", "MORTISE", "SCAPHOID"),
}
_BODY_PARTS = {
    *("HEAD", "SKULL", "FACE", "NOSE", "JAW", "MANDIBLE", "ORBIT", "SPINE", "CSPINE", "TSPINE", "LSPINE", "SSPINE"),
    *("NECK", "CHEST", "RIB", "RIBS", "STERNUM", "CLAVICLE", "SCAPULA", "SHOULDER", "HUMERUS", "UPPERARM", "ELBOW"),
    *("FOREARM", "RADIUS", "ULNA", "WRIST", "SCAPHOID", "HAND", "FINGER", "THUMB", "PELVIS", "HIP", "SACRUM"),
    *("COCCYX", "FEMUR", "THIGH", "KNEE", "PATELLA", "LEG", "TIBIA", "FIBULA", "LOWERLEG", "ANKLE", "FOOT", "HEEL"),
    *("CALCANEUS", "TOE", "ABDOMEN", "EXTREMITY", "ARM", "WHOLEBODY"),
}

_JPEG_2000 = {f"1.2.840.10008.1.2.4.{number}" for number in (90, 91, 201, 202, 203)}  # the last three are HTJ2K
_JPEG_BASELINE, _JPEG_EXTENDED = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"
# Lossless, lossless by the first prediction, JPEG-LS, JPEG-LS near lossless.
_JPEG = {_JPEG_BASELINE, _JPEG_EXTENDED, *(f"1.2.840.10008.1.2.4.{number}" for number in (57, 70, 80, 81))}
_DEFLATED = "1.2.840.10008.1.2.1.99"
_GZIP_HEADER = b"\x1f\x8b\x08" + bytes(7)  # before a deflated stream, whatever follows it
_NATIVE = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", _DEFLATED}
_READ = {*_NATIVE, *_JPEG, *_JPEG_2000, "1.2.840.10008.1.2.5"}  # the last is RLE

_CODESTREAM = b"\xff\x4f\xff\x51"  # where JPEG 2000 begins; the last two bytes are the marker of its sides
# Markers of JPEG.
_FILL, _START_OF_SCAN, _HUFFMAN, _QUANTIZATION = 0xFF, 0xDA, 0xC4, 0xDB
# What stands before the pixels, by the marker of the frame's kind: baseline, extended, progressive, lossless, JPEG-LS.
_TABLES = {
    **{marker: frozenset({_HUFFMAN, _QUANTIZATION}) for marker in (0xC0, 0xC1, 0xC2)},
    **{0xC3: frozenset({_HUFFMAN}), 0xF7: frozenset()},
}

_GREY = {"MONOCHROME1", "MONOCHROME2"}
_COLOUR = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"}
_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
_SQUARE = 0.01  # relative difference of the spacings below which pixels count as square
_LONGEST = 10  # sides of a pixel; more is no radiograph
_LEAST_GREY = (
    0.01  # of the pixels, neither black nor white by a window; less, and it is a placeholder or another image's
)


@dataclass(frozen=True)
class DicomHeader:
    """What a DICOM object is and whom it shows; the ids are as stored, and may never be written."""

    kind: str  # "image", or what the object is instead: "a report", "CT", "another object (NAME OF THE SOP CLASS)", ...
    patient: str  # "" where unknown, as in all that follow
    study: str
    instance: str
    accession: str
    traits: Mapping[str, str]  # small categories: codes of manufacturer and model; detector, kvp, body part, view, ...
    burned_in: bool
    for_processing: bool  # raw values of the detector
    frames: int
    transfer_syntax: str  # UID

    @property
    def why_left_out(self) -> str:
        """Why the object is nothing that a model shall see; "" for a radiograph."""
        if self.kind != "image":
            return f"DICOM, but no radiograph: {self.kind}"
        if self.for_processing:
            return "raw detector image (FOR PROCESSING), unlike what the model will see"
        return ""


class DecodedDicom(NamedTuple):
    """A decoded DICOM file, and how it was stored."""

    grey: Image.Image  # of mode L, with square pixels
    mode: str  # "MONOCHROME1 12 bit"
    width: int  # columns as stored
    height: int  # rows as stored
    traits: Mapping[str, str]  # as in its header


def is_dicom(head: bytes) -> bool:
    """Say whether the first 132 bytes or more are those of DICOM; a file without the preamble is not guessed."""
    return head[_PREAMBLE : _PREAMBLE + len(_MAGIC)] == _MAGIC


def read_header(data: bytes | BinaryIO) -> DicomHeader:
    """Read what a DICOM object is, without its pixels.

    Args:
        data: the whole file, or a stream of it, of which the header is read alone.

    Raises:
        Rejected: damaged.
        OSError: the stream cannot be read.
    """
    dataset = _read_dataset(
        io.BytesIO(data) if isinstance(data, bytes) else data, stop_before_pixels=True, specific_tags=list(_HEADER)
    )
    with _quiet():
        syntax = _read_text(dataset.file_meta, "TransferSyntaxUID")
        frames = _read_numbers(dataset, "NumberOfFrames")
        return DicomHeader(
            kind=_name_kind(dataset),
            patient=_read_text(dataset, "PatientID"),
            study=_read_text(dataset, "StudyInstanceUID"),
            instance=_read_text(dataset, "SOPInstanceUID"),
            accession=_read_text(dataset, "AccessionNumber"),
            traits=_read_traits(dataset),
            burned_in=_read_text(dataset, "BurnedInAnnotation").upper() == "YES",
            for_processing=_is_for_processing(dataset),
            frames=max(1, int(frames[0])) if frames else 1,
            transfer_syntax=syntax if re.fullmatch(r"[0-9.]{1,64}", syntax) else "",
        )


def decode_dicom(data: bytes) -> DecodedDicom:
    """Decode the radiograph of a DICOM file; see `render`.

    Raises:
        Rejected: no radiograph, raw values of the detector, an unknown compression, damaged, or over the limits.
    """
    dataset = _read_dataset(io.BytesIO(data))
    with _quiet():
        kind = _name_kind(dataset)
        if kind in ("image", "another object") and "PixelData" not in dataset:
            raise Rejected("not an image: a DICOM object without pixels, or cut short")
        if kind != "image":
            raise Rejected(f"{kind}, no radiograph")
        if _is_for_processing(dataset):
            raise Rejected("raw detector image, FOR PROCESSING: export the images that are FOR PRESENTATION")
    grey = render(dataset)  # which has read all that follows
    stored = f"{dataset.PhotometricInterpretation} {dataset.BitsStored} bit"
    with _quiet():
        traits = _read_traits(dataset)
    return DecodedDicom(Image.fromarray(grey), stored, int(dataset.Columns), int(dataset.Rows), traits)


def render(dataset: "Dataset") -> np.ndarray:
    """Return the first frame of a dataset as a viewer shows it at first, [H, W] uint8 with square pixels.

    Modality LUT or rescale; VOI LUT or the first window; without either, or where the window leaves less than a
    hundredth of the pixels grey, the range of `grey.choose_range`; MONOCHROME1 or the presentation LUT INVERSE turned,
    once where both are set, since they say the same (DICOM PS3.3 C.8.11.3); padding black. Palette and colour become
    grey.

    Raises:
        Rejected: an unknown compression, damaged, or over the limits.
    """
    try:
        with _quiet(), np.errstate(all="ignore"):
            grey = _make_grey(dataset)
            return _make_square(grey, dataset)
    except (Rejected, MemoryError):
        raise
    except Exception:  # on a damaged file the decoders raise errors of many types, whose texts repeat values
        raise Rejected("damaged: the DICOM pixels cannot be read") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what pydicom warns of and logs: it repeats values that break the standard, and they may be names."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"pydicom|openjpeg")
            yield
    finally:
        logger.setLevel(level)


def _read_dataset(file: BinaryIO, **options: Any) -> "Dataset":
    from pydicom import dcmread

    if _DEFLATED.encode() in file.read(2**16):  # the file meta group comes first
        file.seek(0)
        _check_inflated(file.read())
    file.seek(0)
    try:
        with _quiet():
            return dcmread(file, **options)
    except MemoryError:
        raise
    except EOFError:
        raise Rejected("truncated") from None
    except Exception as error:  # its text may repeat a value
        if isinstance(error, OSError) and error.errno is not None:  # of the disk; pydicom's own have no number
            raise
        raise Rejected("damaged: the DICOM header cannot be read") from None


def _check_inflated(data: bytes) -> None:
    """Refuse a deflated dataset that unfolds to more bytes than a file may have: pydicom would inflate it whole."""
    start = _META_LENGTH + 4 + int.from_bytes(data[_META_LENGTH : _META_LENGTH + 4], "little")
    if _DEFLATED.encode() not in data[: max(start, 2**12)]:
        return
    if _DEFLATED.encode() not in data[:start]:
        raise Rejected("damaged: the DICOM header cannot be read")
    import pyarrow as pa

    size = 0
    try:
        with pa.CompressedInputStream(pa.BufferReader(_GZIP_HEADER + data[start:]), "gzip") as stream:
            while part := len(stream.read(2**20)):
                size += part
                if size > MAX_BYTES:
                    raise Rejected(f"more than {MAX_BYTES:,} bytes when inflated")
    except OSError:  # damaged, or no more than the checksum missing, which DICOM has not: pydicom finds out
        return


def _read_text(dataset: "Dataset", keyword: str) -> str:
    """Return the first value of an element as text; "" if it is not there or cannot be read."""
    try:
        value = dataset.get(keyword)
        if value is None or isinstance(value, bytes):
            return ""
        values = [value] if isinstance(value, str) or not hasattr(value, "__iter__") else [*value]
        return str(values[0]).strip(" \0\n\r\t") if values else ""
    except (MemoryError, Rejected):
        raise
    except Exception:  # a value of the wrong type, of an unknown character set, ...
        return ""


def _read_numbers(dataset: "Dataset", keyword: str) -> list[float]:
    """Return the values of an element; none if it is not there, empty or no number."""
    try:
        value = dataset.get(keyword)
        values = [] if value is None or value == "" else [*value] if hasattr(value, "__iter__") else [value]
        return [number for number in map(float, values) if np.isfinite(number)]
    except MemoryError:
        raise
    except Exception:
        return []


def _name_kind(dataset: "Dataset") -> str:
    from pydicom.uid import UID

    uid = _read_text(dataset, "SOPClassUID") or _read_text(dataset.file_meta, "MediaStorageSOPClassUID")
    modality = _read_text(dataset, "Modality").upper()
    if uid in _IMAGES:
        return _name_capture(dataset, modality) if uid.startswith(_SECONDARY_CAPTURE) else "image"
    known = UID(uid) if re.fullmatch(r"[0-9.]{1,64}", uid) else UID("")
    if not known.type:  # no name that is ours to repeat
        return "image" if modality in _RADIOGRAPHS else _MODALITIES.get(modality, "another object")
    kind = next((kind for word, kind in _KINDS.items() if word in known.name), "")
    return kind or f"another object ({known.name})"


def _name_capture(dataset: "Dataset", modality: str) -> str:
    """Name the kind of a secondary capture: a digitised radiograph is an image, a picture of an image is not."""
    makers = {_read_text(dataset, keyword).lower() for keyword in ("Manufacturer", "ManufacturerModelName")}
    is_made = _OWN_NAME in makers or _has_source(dataset)
    return _MODALITIES.get(modality) or ("a picture made of another image" if is_made else "image")


def _has_source(dataset: "Dataset") -> bool:
    """Say whether the object names an image that it was made of, other than itself before it was compressed."""
    try:
        for source in dataset.get("SourceImageSequence") or []:
            purposes = source.get("PurposeOfReferenceCodeSequence") or []
            if _PREDECESSOR not in (_read_text(purpose, "CodeValue") for purpose in purposes):
                return True
    except MemoryError:
        raise
    except Exception:  # of damaged items; they are there
        return True
    return False


def _is_for_processing(dataset: "Dataset") -> bool:
    raw = _read_text(dataset, "PresentationIntentType").upper() == "FOR PROCESSING"
    return raw or _read_text(dataset, "SOPClassUID") in _FOR_PROCESSING


def _read_traits(dataset: "Dataset") -> dict[str, str]:
    read = {keyword: _read_text(dataset, keyword).upper() for keyword in _HEADER}
    kvp = _read_numbers(dataset, "KVP")
    return {
        "manufacturer": _encode(read["Manufacturer"]),
        "model": _encode(read["ManufacturerModelName"]),
        "detector": _choose(read["DetectorType"], _DETECTORS),
        "kvp": str(5 * round(kvp[0] / 5)) if kvp and 0 < kvp[0] < 1000 else "",
        "body part": _choose(re.sub(r"[ _-]", "", read["BodyPartExamined"]), _BODY_PARTS),
        "view": _choose(read["ViewPosition"], _VIEWS),
        "laterality": _choose(read["ImageLaterality"] or read["Laterality"], {"L", "R", "B", "U"}),
        "age": _name_decade(read["PatientAge"], read["PatientBirthDate"], read["StudyDate"]),
        "sex": _choose(read["PatientSex"], {"M", "F", "O"}),
    }


def _encode(text: str) -> str:
    """Return a code of 16 bits, which tells values apart. The text may hold anything, and many texts have one code."""
    text = re.sub(r"[^A-Z0-9]+", " ", text).strip()
    return hashlib.sha256(text.encode()).hexdigest()[:4] if text else ""


def _choose(text: str, known: set[str]) -> str:
    """Return a known category; "other" for any other text, which may hold anything."""
    return text if text in known else "other" if text else ""


def _name_decade(age: str, birth: str, study: str) -> str:
    if found := re.fullmatch(r"(\d{3})([DWMY])", age):
        years = int(found[1]) if found[2] == "Y" else int(found[1]) // {"D": 365, "W": 52, "M": 12}[found[2]]
    elif re.fullmatch(r"\d{8}", birth) and re.fullmatch(r"\d{8}", study):
        years = (int(study) - int(birth)) // 10_000  # digits of a date sort as dates do
    else:
        return ""
    decade = years // 10 * 10
    return "" if not 0 <= years < 130 else "90+" if decade >= 90 else f"{decade}-{decade + 9}"


def _make_grey(dataset: "Dataset") -> np.ndarray:
    """Return the first frame, [rows, columns] uint8."""
    rows, columns, bits = (_read_count(dataset, name) for name in ("Rows", "Columns", "BitsStored"))
    check_pixels(columns, rows)
    interpretation = _read_text(dataset, "PhotometricInterpretation")
    if interpretation not in _GREY | _COLOUR | {"PALETTE COLOR"}:
        raise Rejected("a DICOM image of an unknown photometric interpretation")
    values = _decompress(dataset, rows, columns)
    if interpretation in _COLOUR:
        return _reduce_colour(values)
    if values.ndim != 2:
        raise Rejected("damaged: a grey DICOM image of several samples a pixel")
    if values.dtype.itemsize > 2:
        raise Rejected(f"DICOM grey of {bits} bits, over the limit of 16")
    values = values.view(f"u{values.dtype.itemsize}")
    if interpretation == "PALETTE COLOR":
        return look_up(values, _make_palette(dataset, values.dtype))
    return look_up(values, _make_table(dataset, values, interpretation == "MONOCHROME1"))


def _read_count(dataset: "Dataset", keyword: str) -> int:
    numbers = _read_numbers(dataset, keyword)
    if not numbers or numbers[0] < 1:
        raise Rejected(f"damaged: a DICOM image without {keyword}")
    return int(numbers[0])


def _decompress(dataset: "Dataset", rows: int, columns: int) -> np.ndarray:
    """Return the first frame as stored, or as RGB: [rows, columns] or [rows, columns, 3] integers."""
    from pydicom.pixels import pixel_array

    syntax = _read_text(dataset.file_meta, "TransferSyntaxUID")
    if syntax not in _READ:
        raise Rejected(f"{_name_syntax(syntax)}: a compression that is not read")
    if syntax in _NATIVE:
        _check_length(dataset, rows, columns)
    if syntax not in _JPEG | _JPEG_2000:
        values = pixel_array(dataset, index=0, correct_unused_bits=False)
        return values.astype(values.dtype.newbyteorder("="), copy=False)
    try:
        return _decode_frame(dataset, syntax, rows, columns)
    except (Rejected, MemoryError):
        raise
    except Exception:
        raise Rejected(f"damaged: the pixels cannot be decompressed ({_name_syntax(syntax)})") from None


def _decode_frame(dataset: "Dataset", syntax: str, rows: int, columns: int) -> np.ndarray:
    """Decode JPEG by Pillow where it can, else by GDCM, and JPEG 2000 by OpenJPEG.

    GDCM ends the process on some damage of a JPEG's header, so that is found first.
    """
    from openjpeg import decode
    from pydicom.pixels import pixel_array

    frame = _read_frame(dataset)
    if syntax in _JPEG_2000:
        frame = frame[frame.index(_CODESTREAM) :]  # some are whole files, with a header of their own
    samples, allocated = (_read_count(dataset, name) for name in ("SamplesPerPixel", "BitsAllocated"))
    header = _read_codestream(frame) if syntax in _JPEG_2000 else _read_jpeg(frame)
    if header[:3] != (rows, columns, samples) or not 2 <= header[3] <= allocated <= 32:
        raise Rejected("damaged: compressed pixels of other sides, colours or depth than the DICOM header's")
    if syntax in _JPEG_2000:
        values = decode(frame, j2k_format=0)
        is_luminance = _read_text(dataset, "PhotometricInterpretation").startswith("YBR_FULL")
        return values[..., [0, 0, 0]] if is_luminance else values  # YBR_ICT and YBR_RCT come as RGB
    if syntax not in (_JPEG_BASELINE, _JPEG_EXTENDED):
        return pixel_array(dataset, index=0, decoding_plugin="gdcm", correct_unused_bits=False)
    if header[3] == 8:
        return pixel_array(dataset, index=0, decoding_plugin="pillow", correct_unused_bits=False)
    if header[3] not in (12, 16) or samples > 1:  # GDCM itself writes 16 for 12
        raise Rejected(f"JPEG Extended of {samples} x {header[3]} bits: one of 8 or 12 is read")
    return _decode_12_bits(frame, rows, columns)


def _name_syntax(uid: str) -> str:
    from pydicom.uid import UID

    known = UID(uid) if re.fullmatch(r"[0-9.]{1,64}", uid) else UID("")
    return known.name if known.type else "an unknown transfer syntax"


def _check_length(dataset: "Dataset", rows: int, columns: int) -> None:
    samples, bits = (_read_count(dataset, name) for name in ("SamplesPerPixel", "BitsAllocated"))
    if _read_text(dataset, "PhotometricInterpretation") == "YBR_FULL_422":
        samples = 2  # of three, two have half the columns
    if len(dataset.PixelData) < rows * columns * samples * bits // 8:
        raise Rejected("truncated")


def _read_frame(dataset: "Dataset") -> bytes:
    from pydicom.encaps import get_frame

    frames = _read_numbers(dataset, "NumberOfFrames")
    return get_frame(dataset.PixelData, 0, number_of_frames=max(1, int(frames[0])) if frames else 1)


def _read_codestream(frame: bytes) -> tuple[int, int, int, int]:
    """Return rows, columns, samples a pixel and bits a sample of JPEG 2000, which its decoder allocates memory for."""
    columns, rows, left, top = struct.unpack_from(">4I", frame, 8)
    samples, depth = struct.unpack_from(">HB", frame, 40)
    return rows - top, columns - left, samples, (depth & 0x7F) + 1


def _read_jpeg(frame: bytes) -> tuple[int, int, int, int]:
    """Return rows, columns, samples a pixel and bits a sample of JPEG, whose segments lead unbroken to the pixels."""
    at, seen, found = 2, set(), None
    while frame[at] == 0xFF:
        marker, length = struct.unpack_from(">xBH", frame, at)
        if marker == _FILL:
            at += 1
            continue
        if marker == _START_OF_SCAN and found and _TABLES[found[0]] <= seen:
            return found[1:]
        if marker in _TABLES and not found:
            bits, rows, columns, samples = struct.unpack_from(">BHHB", frame, at + 4)
            found = marker, rows, columns, samples, bits
        seen.add(marker)
        at += 2 + length
    raise ValueError("no start of frame, no tables or no pixels")


def _decode_12_bits(frame: bytes, rows: int, columns: int) -> np.ndarray:
    """Decode JPEG Extended with 12 bits by GDCM, which can, though pydicom does not let it."""
    import gdcm

    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(frame)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((columns, rows, 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGExtendedProcess2_4))
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, 12, 11, 0))
    pixels = image.GetBuffer().encode("utf-8", "surrogateescape")  # GDCM's bytes come as text
    return np.frombuffer(pixels, "<u2").reshape(rows, columns)


def _reduce_colour(values: np.ndarray) -> np.ndarray:
    import cv2

    if values.ndim != 3 or values.shape[2] != 3:
        raise Rejected("damaged: a DICOM colour image without three samples a pixel")
    if values.dtype.itemsize == 1:
        return np.asarray(Image.fromarray(values.view(np.uint8)).convert("L"))
    if values.dtype.itemsize == 4:
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    grey = cv2.cvtColor(values.view(np.uint16), cv2.COLOR_RGB2GRAY)
    levels = np.arange(2**16)
    return look_up(grey, scale_to_8_bits(levels, *choose_range(levels, count_values(grey))))


def _make_palette(dataset: "Dataset", dtype: np.dtype) -> np.ndarray:
    """Return the grey of each value of a palette, [values] uint8."""
    from pydicom.pixels import apply_color_lut

    colours = apply_color_lut(np.arange(2 ** (8 * dtype.itemsize)).astype(dtype), dataset)[:, :3]
    if colours.dtype != np.uint8:
        if dataset.original_encoding[1] is False and "RedPaletteColorLookupTableData" in dataset:
            colours = colours.byteswap()  # pydicom reads this table as little endian
        colours = (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8)  # some have 8 bits in 16
    return np.asarray(Image.fromarray(colours[None]).convert("L"))[0]


def _make_table(dataset: "Dataset", values: np.ndarray, is_inverse: bool) -> np.ndarray:
    """Return the grey of each value that a pixel can have as stored, [values] uint8."""
    sources = _list_sources(dataset)
    stored = _read_stored_levels(dataset, values.dtype)
    padding = _find_padding(dataset, stored)
    levels = _apply_modality(sources, stored)
    voi, window = _find_item(sources, "VOILUTSequence"), _find_window(sources)
    if voi is not None:
        first, table, white = _read_lut(voi)
        grey = scale_to_8_bits(_apply_lut(levels, first, table), 0, white)
    else:
        grey = _choose_grey(levels, np.where(padding, 0, count_values(values)), window)
    if is_inverse or _read_text(dataset, "PresentationLUTShape") == "INVERSE":
        grey = 255 - grey
    return np.where(padding, np.uint8(0), grey)


def _choose_grey(levels: np.ndarray, counts: np.ndarray, window: tuple[float, float, str] | None) -> np.ndarray:
    """Return the grey of each level by the window, or by `choose_range` where that leaves nearly no pixel grey."""
    if window is not None:
        grey = np.round(_apply_window(levels, *window) * 255).astype(np.uint8)
        if counts[(grey > 0) & (grey < 255)].sum() >= _LEAST_GREY * counts.sum():
            return grey
    return scale_to_8_bits(levels, *choose_range(levels, counts))


def _list_sources(dataset: "Dataset") -> list["Dataset"]:
    """Return the dataset, and the groups of attributes of all frames and of the first that enhanced objects have."""
    groups = [
        item
        for keyword in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")
        for item in (dataset.get(keyword) or [])[:1]
    ]
    nested = [inner for group in groups for element in group if element.VR == "SQ" for inner in element.value[:1]]
    return [dataset, *nested]


def _find_item(sources: list["Dataset"], keyword: str) -> "Dataset | None":
    return next((source.get(keyword)[0] for source in sources if source.get(keyword)), None)


def _read_stored_levels(dataset: "Dataset", dtype: np.dtype) -> np.ndarray:
    """Return the number that each pattern of bits stands for, [values] int64: bits stored, high bit and sign."""
    width = 8 * dtype.itemsize
    bits = min(_read_count(dataset, "BitsStored"), width)
    high = _read_numbers(dataset, "HighBit")
    shift = int(high[0]) + 1 - bits if high and width >= high[0] + 1 > bits else 0
    if _read_text(dataset.file_meta, "TransferSyntaxUID") not in _NATIVE:
        shift = 0  # a decoder returns the bits stored as the lowest
    levels = (np.arange(2**width) >> shift) & (2**bits - 1)
    is_signed = (_read_numbers(dataset, "PixelRepresentation") or [0])[0] == 1
    return np.where(levels >= 2 ** (bits - 1), levels - 2**bits, levels) if is_signed else levels


def _find_padding(dataset: "Dataset", stored: np.ndarray) -> np.ndarray:
    """Return which levels are padding, [values] bool."""
    padding = _read_numbers(dataset, "PixelPaddingValue")
    if not padding:
        return np.zeros(len(stored), bool)
    limit = _read_numbers(dataset, "PixelPaddingRangeLimit") or padding
    signed = stored.min() < 0  # the element's type does not always say the same as the pixels'
    ends = [(value + 2**15) % 2**16 - 2**15 if signed else value % 2**16 for value in (padding[0], limit[0])]
    return (stored >= min(ends)) & (stored <= max(ends))


def _apply_modality(sources: list["Dataset"], stored: np.ndarray) -> np.ndarray:
    item = _find_item(sources, "ModalityLUTSequence")
    if item is not None:
        first, table, _ = _read_lut(item)
        return _apply_lut(stored, first, table)
    slope, intercept = (_find_numbers(sources, name) for name in ("RescaleSlope", "RescaleIntercept"))
    if slope is None or intercept is None:
        return stored
    if slope[0] == 0:
        raise Rejected("damaged: a rescale slope of 0")
    return stored * slope[0] + intercept[0]


def _find_numbers(sources: list["Dataset"], keyword: str) -> list[float] | None:
    """Return the values of the first source that has any.

    Raises:
        Rejected: they are no numbers.
    """
    for source in sources:
        if keyword in source and source[keyword].VM:
            numbers = _read_numbers(source, keyword)
            if len(numbers) < source[keyword].VM:
                raise Rejected(f"damaged: {keyword} is no number")
            return numbers
    return None


def _read_lut(item: "Dataset") -> tuple[int, np.ndarray, int]:
    """Read a LUT: the level that its first value is for, [N] values, and the largest that they can have."""
    count, first, bits = (int(value) for value in item.LUTDescriptor)
    data = item.LUTData
    if isinstance(data, bytes):
        order = "<" if item.original_encoding[1] is not False else ">"
        table = np.frombuffer(data, "u1" if len(data) in (count, count + count % 2) else f"{order}u2")
    else:
        table = np.atleast_1d(np.array(data))
    count = count or 2**16
    if len(table) < count or not 1 <= bits <= 16:
        raise Rejected("damaged: a LUT shorter than it says")
    table = table[:count].astype(np.int64)
    return first, table, 2 ** max(bits, int(table.max()).bit_length()) - 1


def _apply_lut(levels: np.ndarray, first: int, table: np.ndarray) -> np.ndarray:
    return table[np.clip(np.round(levels) - first, 0, len(table) - 1).astype(np.int64)]


def _find_window(sources: list["Dataset"]) -> tuple[float, float, str] | None:
    """Return centre, width and function of the first window; None if there is none, or one too narrow for its function.

    Raises:
        Rejected: a window of an unknown function, or that is no number.
    """
    centre, width = (_find_numbers(sources, name) for name in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None:
        return None
    function = next((text for source in sources if (text := _read_text(source, "VOILUTFunction"))), "LINEAR").upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise Rejected("a DICOM window of an unknown function")
    if width[0] <= 0 or (function == "LINEAR" and width[0] <= 1):
        return None
    return centre[0], width[0], function


def _apply_window(levels: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Map levels to [0, 1], by DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (levels - centre) / width))
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    below, above = levels <= centre - width / 2, levels > centre + width / 2
    between = np.clip((levels - centre) / max(width, np.finfo(float).tiny) + 0.5, 0, 1)
    return np.where(below, 0, np.where(above, 1, between))


def _make_square(grey: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """Stretch the side along which pixels are longer; the first spacing that is there decides."""
    numbers = (_read_numbers(dataset, name) for name in _SPACINGS)
    pairs = (pair for pair in numbers if len(pair) >= 2 and min(pair[:2]) > 0)
    down, across, *_ = next(pairs, [1.0, 1.0])
    ratio = down / across
    if abs(ratio - 1) < _SQUARE:
        return grey
    if not 1 / _LONGEST <= ratio <= _LONGEST:
        raise Rejected(f"damaged: pixels {max(ratio, 1 / ratio):.0f} times as long as wide")
    rows, columns = grey.shape
    size = (columns, round(rows * ratio)) if ratio > 1 else (round(columns / ratio), rows)
    check_pixels(*size)
    return np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR))
