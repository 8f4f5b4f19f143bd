"""DICOM made here, with known values: what the picture is, what is left out, and what is refused."""

import errno
import io
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    MPEG2MPML,
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

from fracture.inference.dicom_answer.capture import build_capture
from fracture.inference.dicom_answer.header import Algorithm
from fracture.preparation.decoding import dicom as dicom_module
from fracture.preparation.decoding.decode import Rejected, decode
from fracture.preparation.decoding.dicom import decode_dicom, is_dicom, read_header, render
from fracture.preparation.facts import scan_bytes
from fracture.preparation.source import ImageFile
from tests.preparation.decoding.dicom_files import (
    CR,
    DX,
    LOSSLESS,
    SECONDARY_CAPTURE,
    compressed,
    dataset,
    encoded,
    radiograph,
)

RADIOGRAPH = radiograph(12)  # every 12-bit range is filled, so that white is 4095
SHOWN = np.round(RADIOGRAPH * (255 / 4095)).astype(np.uint8)
RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)  # each 12-bit value once
EXACT = {"VOILUTFunction": "LINEAR_EXACT"}
NAME = "Mustermann"


def shown(values: np.ndarray, bits: int = 12, **elements) -> np.ndarray:
    return render(dcmread(io.BytesIO(encoded(dataset(values, bits, **elements)))))


def lut(first: int, values: list[int], bits: int) -> Sequence:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(values) % 2**16, first, bits])
    item.add_new("LUTData", "OW", np.array(values, "<u2").tobytes())
    return Sequence([item])


def test_dicom_is_known_by_its_magic():
    data = encoded(dataset(RADIOGRAPH))
    assert is_dicom(data[:132])
    assert not is_dicom(data[:131])
    assert not is_dicom(b"DICM" + bytes(200))
    assert not is_dicom(b"")


@pytest.mark.parametrize("syntax", [*LOSSLESS, HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL], ids=lambda uid: uid.name)
def test_every_lossless_transfer_syntax_gives_the_same_picture(syntax: str, tmp_path: Path):
    data = compressed(dataset(RADIOGRAPH), syntax, tmp_path)
    assert read_header(data).transfer_syntax == syntax
    assert np.array_equal(decode_dicom(data)[0], SHOWN)


@pytest.mark.parametrize(
    ("syntax", "bits", "most"),
    [(JPEGExtended12Bit, 12, 1), (JPEGLSNearLossless, 12, 1), (JPEG2000, 12, 4), (JPEGBaseline8Bit, 8, 8)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_every_lossy_transfer_syntax_gives_nearly_the_same(syntax: str, bits: int, most: int, tmp_path: Path):
    values = RADIOGRAPH if bits == 12 else SHOWN
    picture, mode, *_ = decode_dicom(compressed(dataset(values, bits), syntax, tmp_path))
    assert mode == f"MONOCHROME2 {bits} bit"
    assert np.abs(np.asarray(picture).astype(int) - SHOWN).max() <= most


def test_a_dicom_file_is_decoded_as_any_image():
    image = decode(encoded(dataset(RADIOGRAPH[:32], PhotometricInterpretation="MONOCHROME1")), 32)
    assert (image.format, image.mode, image.width, image.height) == ("DICOM", "MONOCHROME1 12 bit", 64, 32)
    assert image.grey.size == (64, 32)
    assert image.pixels.shape == (32, 32)


@pytest.mark.parametrize(
    ("function", "centre", "width", "expected"),
    [
        ("LINEAR", 2000, 1001, {1499: 0, 2000: 128, 2499: 255, 3000: 255}),  # (2000 - 1999.5) / 1000 + 0.5 = 0.5005
        ("LINEAR_EXACT", 2000, 1000, {1500: 0, 1700: 51, 2000: 128, 2500: 255}),  # 0.2 · 255
        ("SIGMOID", 2000, 1000, {1000: 5, 2000: 128, 3000: 250}),  # 255 / (1 + e⁴) = 4.6
        (None, 2000, 1001, {1499: 0, 2000: 128, 2499: 255}),
    ],
)
def test_windows(function: str | None, centre: float, width: float, expected: dict[int, int]):
    picture = shown(RAMP, WindowCenter=centre, WindowWidth=width, **({"VOILUTFunction": function} if function else {}))
    assert {value: int(picture.ravel()[value]) for value in expected} == expected


@pytest.mark.parametrize(
    ("centre", "width"), [(0, 1), (2000, 1), (5, 0), (5, 0.5), (2000, -1000), (-3000, 400), (9000, 400), (2000, 10)]
)
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_a_window_that_leaves_no_grey_counts_as_none(function: str, centre: float, width: float):
    window = {"WindowCenter": centre, "WindowWidth": width, "VOILUTFunction": function}
    assert np.array_equal(shown(RADIOGRAPH, **window), SHOWN)
    padded = np.vstack([RADIOGRAPH, np.full((64, 64), 2001, np.uint16)])  # of which the window would make grey
    picture = shown(padded, **window, PixelPaddingValue=2001, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(picture[:64][RADIOGRAPH != 2001], 255 - SHOWN[RADIOGRAPH != 2001])


def test_a_window_of_a_ct_makes_no_white_image_of_a_radiograph():
    values = RADIOGRAPH // 2 + 500
    assert np.array_equal(shown(values, WindowCenter=40, WindowWidth=400), shown(values))


def test_a_window_of_fractions_counts():
    picture = shown(RAMP, RescaleSlope=0.001, RescaleIntercept=0, WindowCenter=2, WindowWidth=1, **EXACT)
    assert [int(picture.ravel()[value]) for value in (1500, 2000, 2500)] == [0, 128, 255]


def test_the_first_of_several_windows_counts():
    one = shown(RAMP, WindowCenter=2000, WindowWidth=1000)
    assert np.array_equal(shown(RAMP, WindowCenter=[2000, 9], WindowWidth=[1000, 9]), one)
    assert not np.array_equal(shown(RAMP, WindowCenter=[9, 2000], WindowWidth=[9, 1000]), one)


def test_the_window_is_of_rescaled_values():
    plain = shown(RAMP, WindowCenter=2000, WindowWidth=1000)
    rescaled = shown(RAMP, RescaleSlope=2, RescaleIntercept=-500, WindowCenter=3499.5, WindowWidth=1999)
    assert np.abs(plain.astype(int) - rescaled).max() <= 1


def test_a_voi_lut_goes_before_the_window():
    table = [0] * 1000 + [100] * 1000 + [255] * 2096
    picture = shown(RAMP, VOILUTSequence=lut(0, table, 8), WindowCenter=9, WindowWidth=9)
    assert np.array_equal(picture.ravel(), table)
    later = shown(RAMP, VOILUTSequence=lut(2000, [0, 4095], 12))  # below and above, the ends of the table
    assert (later.ravel()[2000], later.ravel()[2001], later.ravel()[4095]) == (0, 255, 255)


def test_a_modality_lut_goes_before_the_window():
    turned = [4095 - value for value in range(4096)]
    picture = shown(RAMP, ModalityLUTSequence=lut(0, turned, 12), WindowCenter=2000, WindowWidth=1000)
    plain = shown(4095 - RAMP, WindowCenter=2000, WindowWidth=1000)
    assert np.array_equal(picture, plain)


def test_without_a_window_the_percentiles_of_raw_values_become_black_and_white():
    values = np.full((100, 100), 1000, np.uint16)
    values.ravel()[:5000] = np.linspace(1500, 2000, 5000)
    values.ravel()[-20:] = 4095  # 0.2 %
    picture = shown(values)
    assert (picture.min(), picture.max(), picture[-1, 0]) == (0, 255, 0)
    low, high = np.percentile(values, (0.5, 99.5), method="inverted_cdf")
    assert np.array_equal(picture, np.round(np.clip((values - low) / (high - low), 0, 1) * 255))


@pytest.mark.parametrize(
    ("slope", "intercept"),
    [(1, 0), (2, -500), (1, -3000), (0.01, 0), (0.01, -30), (-1, 0)],  # rescaled, or not
)
def test_a_flat_exposure_without_a_window_is_blank(slope: float, intercept: float):
    values = np.random.default_rng(0).integers(1990, 2011, (300, 300), np.uint16)
    data = encoded(dataset(values, RescaleSlope=slope, RescaleIntercept=intercept))
    with pytest.raises(Rejected, match="blank"):
        scan_bytes(ImageFile("IM1", 0, "", 9, 0, is_dicom=True), data, 64)
    picture = shown(RADIOGRAPH // 8 + 1000, RescaleSlope=slope, RescaleIntercept=intercept)
    assert (picture.min(), picture.max()) == (0, 255)


def test_values_that_fill_their_depth_are_not_stretched():
    assert np.array_equal(shown(RADIOGRAPH), SHOWN)
    assert np.array_equal(shown(RADIOGRAPH, bits=16), SHOWN)  # the depth is not what the header says
    assert np.array_equal(shown(SHOWN // 2, bits=8), SHOWN // 2)  # 8 bits are as they are
    assert np.array_equal(shown((SHOWN // 2).astype(np.uint16) * 16), SHOWN // 2)


def test_padding_is_black_and_does_not_count():
    values = RADIOGRAPH // 8 + 1000
    plain = shown(values[16:])
    padded = values.copy()
    padded[:16] = 4000
    assert np.array_equal(shown(padded, PixelPaddingValue=4000)[16:], plain)
    for interpretation in ("MONOCHROME1", "MONOCHROME2"):
        assert shown(padded, PixelPaddingValue=4000, PhotometricInterpretation=interpretation)[:16].max() == 0
    padded[:8] = 3990
    assert np.array_equal(shown(padded, PixelPaddingValue=4000, PixelPaddingRangeLimit=3990)[16:], plain)
    signed = values.astype(np.int16) - 1500
    signed[:16] = -2000
    assert np.array_equal(shown(signed, bits=16, PixelPaddingValue=-2000)[16:], plain)


@pytest.mark.parametrize(
    ("interpretation", "shape", "is_turned"),
    [
        ("MONOCHROME2", None, False),
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", None, True),
        ("MONOCHROME1", "IDENTITY", True),
        ("MONOCHROME1", "INVERSE", True),  # as the standard has it for DX: one turn, said twice
    ],
)
def test_what_is_inverse_is_turned_once(interpretation: str, shape: str | None, is_turned: bool):
    elements = {"PresentationLUTShape": shape} if shape else {}
    picture = shown(RADIOGRAPH, PhotometricInterpretation=interpretation, **elements)
    assert np.array_equal(picture, 255 - SHOWN if is_turned else SHOWN)


def test_bits_stored_high_bit_and_sign():
    noise = np.random.default_rng(0).integers(0, 16, RADIOGRAPH.shape, np.uint16)
    window = {"WindowCenter": 2047.5, "WindowWidth": 4095, "VOILUTFunction": "LINEAR_EXACT"}
    assert np.array_equal(shown(RADIOGRAPH | noise << 12, **window), SHOWN)  # an overlay above the bits stored
    assert np.array_equal(shown(RADIOGRAPH << 4 | noise, HighBit=15, **window), SHOWN)
    signed = (RADIOGRAPH.astype(np.int16) - 2048) & 0x0FFF  # the sign is bit 11
    assert np.array_equal(shown(signed.astype(np.int16), **window | {"WindowCenter": -0.5}), SHOWN)


def test_big_endian_is_read_as_little_endian():
    values = RADIOGRAPH.astype(np.int16) - 1000
    little, big = (
        render(dcmread(io.BytesIO(encoded(dataset(values, 16), syntax))))
        for syntax in (ExplicitVRLittleEndian, ExplicitVRBigEndian)
    )
    assert np.array_equal(little, big)


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize(("depth", "factor"), [(np.uint8, 1), (np.uint16, 257), (np.uint16, 16)])
def test_colour_becomes_grey(planar: int, depth: type, factor: int):
    values = np.stack([SHOWN.astype(depth) * depth(factor)] * 3, axis=-1)
    made = dataset(values, 8 * values.dtype.itemsize, PlanarConfiguration=planar)
    made.PixelData = (np.moveaxis(values, -1, 0) if planar else values).tobytes()
    assert np.array_equal(render(dcmread(io.BytesIO(encoded(made)))), SHOWN)


@pytest.mark.parametrize("interpretation", ["YBR_FULL", "YBR_FULL_422"])
def test_luminance_is_grey(interpretation: str):
    values = np.stack([SHOWN, np.full_like(SHOWN, 128), np.full_like(SHOWN, 128)], axis=-1)
    made = dataset(values, 8, PhotometricInterpretation=interpretation)
    if interpretation == "YBR_FULL_422":
        pairs = SHOWN.reshape(-1, 2)
        made.PixelData = np.concatenate([pairs, np.full_like(pairs, 128)], axis=1).tobytes()
    assert np.abs(render(dcmread(io.BytesIO(encoded(made)))).astype(int) - SHOWN).max() <= 1


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_palettes_become_grey(syntax: str):
    made = dataset(SHOWN, 8, PhotometricInterpretation="PALETTE COLOR")
    order = "<" if syntax == ExplicitVRLittleEndian else ">"
    for colour in ("Red", "Green", "Blue"):
        made.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [256, 0, 16])
        turned = (65535 - np.arange(256) * 257).astype(f"{order}u2")
        made.add_new(f"{colour}PaletteColorLookupTableData", "OW", turned.tobytes())
    assert np.array_equal(render(dcmread(io.BytesIO(encoded(made, syntax)))), 255 - SHOWN)


@pytest.mark.parametrize(
    ("elements", "shape"),
    [
        ({"PixelSpacing": [0.2, 0.1]}, (128, 64)),
        ({"PixelAspectRatio": [1, 2]}, (64, 128)),
        ({"PixelSpacing": [0, 0], "PixelAspectRatio": [1, 2]}, (64, 128)),
        ({"ImagerPixelSpacing": [0.1, 0.1], "PixelAspectRatio": [1, 2]}, (64, 64)),
        ({"PixelSpacing": [0.1000, 0.1004]}, (64, 64)),
    ],
)
def test_pixels_become_square(elements: dict[str, list[float]], shape: tuple[int, int]):
    assert shown(RADIOGRAPH, **elements).shape == shape


def test_the_first_frame_is_the_picture():
    made = dataset(RADIOGRAPH, NumberOfFrames=2)
    made.PixelData = RADIOGRAPH.tobytes() + bytes(RADIOGRAPH.nbytes)
    data = encoded(made)
    assert read_header(data).frames == 2
    assert np.array_equal(decode_dicom(data)[0], SHOWN)


def test_an_enhanced_object_has_its_window_in_a_group():
    window, group = Dataset(), Dataset()
    window.WindowCenter, window.WindowWidth = 2000, 1000
    group.FrameVOILUTSequence = Sequence([window])
    plain = shown(RAMP, WindowCenter=2000, WindowWidth=1000)
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        enhanced = shown(RAMP, SOPClassUID="1.2.840.10008.5.1.4.1.1.12.1.1", **{keyword: Sequence([group])})
        assert np.array_equal(enhanced, plain)


def test_the_header():
    made = dataset(
        RADIOGRAPH,
        **{"PatientID": " P1 ", "AccessionNumber": "X", "BurnedInAnnotation": "YES"},
        **{"Manufacturer": "Acme, Inc.", "ManufacturerModelName": "One®", "DetectorType": "DIRECT", "KVP": 52.4},
        **{"BodyPartExamined": "WRIST", "ViewPosition": "PA", "ImageLaterality": "L", "PatientAge": "067Y"},
        **{"PatientSex": "F", "SpecificCharacterSet": "ISO_IR 192"},
    )
    header = read_header(encoded(made))
    assert (header.kind, header.patient, header.accession) == ("image", "P1", "X")
    assert (header.study, header.instance) == ("1.2.3", "1.2.3.4")
    assert (header.burned_in, header.for_processing, header.frames) == (True, False, 1)
    assert header.traits == {
        **{"manufacturer": "7798", "model": "2192", "detector": "DIRECT", "kvp": "50", "body part": "WRIST"},
        **{"view": "PA", "laterality": "L", "age": "60-69", "sex": "F"},
    }
    assert decode_dicom(encoded(made)).traits == header.traits, "read with the pixels"


def test_a_header_without_anything():
    header = read_header(encoded(dataset(RADIOGRAPH)))
    assert (header.patient, header.accession, header.burned_in) == ("", "", False)
    assert set(header.traits.values()) == {""}


def test_ages_from_dates_and_categories_from_free_text():
    dates = {"PatientBirthDate": "19500702", "StudyDate": "20200701"}
    assert read_header(encoded(dataset(RADIOGRAPH, **dates))).traits["age"] == "60-69"
    assert read_header(encoded(dataset(RADIOGRAPH, PatientAge="015W"))).traits["age"] == "0-9"
    assert read_header(encoded(dataset(RADIOGRAPH, PatientAge="101Y"))).traits["age"] == "90+"
    assert read_header(encoded(dataset(RADIOGRAPH, BodyPartExamined=NAME.upper()))).traits["body part"] == "other"


@pytest.mark.parametrize(
    ("sop_class", "modality", "kind"),
    [
        (DX, "DX", "image"),
        (CR, "CR", "image"),
        (SECONDARY_CAPTURE, "OT", "image"),
        (SECONDARY_CAPTURE, "CT", "CT"),
        ("1.2.840.10008.5.1.4.1.1.12.1", "XA", "image"),
        ("1.2.840.10008.5.1.4.1.1.2", "CT", "CT"),
        ("1.2.840.10008.5.1.4.1.1.2.1", "CT", "CT"),
        ("1.2.840.10008.5.1.4.1.1.4", "MR", "MR"),
        ("1.2.840.10008.5.1.4.1.1.6.1", "US", "ultrasound"),
        ("1.2.840.10008.5.1.4.1.1.1.2", "MG", "mammography"),
        ("1.2.840.10008.5.1.4.1.1.88.33", "SR", "a report"),
        ("1.2.840.10008.5.1.4.1.1.88.67", "SR", "a report"),
        ("1.2.840.10008.5.1.4.1.1.88.59", "KO", "a key object"),
        ("1.2.840.10008.5.1.4.1.1.104.1", "DOC", "a PDF"),
        ("1.2.840.10008.5.1.4.1.1.11.1", "PR", "a presentation state"),
        ("1.2.840.10008.1.3.10", "", "a DICOMDIR"),
        ("1.2.840.10008.5.1.4.1.1.66", "", "another object (Raw Data Storage)"),
        ("1.2.276.0.7230010.3.1.0.1", "", "another object"),  # a private class
        ("1.2.276.0.7230010.3.1.0.1", "CR", "image"),
    ],
)
def test_objects_are_named_by_their_class(sop_class: str, modality: str, kind: str):
    data = encoded(dataset(RADIOGRAPH, SOPClassUID=sop_class, Modality=modality))
    assert read_header(data).kind == kind
    if kind != "image":
        with pytest.raises(Rejected, match=r"no radiograph"):
            decode_dicom(data)


@pytest.mark.parametrize("kept", [("SourceImageSequence",), ("Manufacturer",), ("ManufacturerModelName",)])
def test_our_own_captures_are_no_radiographs(kept: tuple[str, ...]):
    algorithm = Algorithm(version="1", fingerprint="ab", threshold=0.5, fracture_threshold=0.5)
    source = dataset(RADIOGRAPH, SeriesInstanceUID="1.2.3.5", PatientID="P1")
    capture = build_capture(source, np.dstack([SHOWN] * 3), algorithm, 1)
    for keyword in {"SourceImageSequence", "Manufacturer", "ManufacturerModelName"} - {*kept}:
        delattr(capture, keyword)
    file = io.BytesIO()
    capture.save_as(file, enforce_file_format=True)
    assert read_header(file.getvalue()).kind == "a picture made of another image"
    with pytest.raises(Rejected, match="a picture made of another image, no radiograph"):
        decode_dicom(file.getvalue())


@pytest.mark.parametrize("sop_class", [SECONDARY_CAPTURE, *(f"{SECONDARY_CAPTURE}.{number}" for number in range(1, 5))])
def test_a_capture_of_a_film_is_an_image_and_one_of_another_image_is_not(sop_class: str):
    digitised = dataset(RADIOGRAPH, SOPClassUID=sop_class, ImageType=["DERIVED", "SECONDARY"], Manufacturer="Acme")
    digitised.SourceImageSequence = Sequence([])
    assert read_header(encoded(digitised)).kind == "image"
    digitised.SourceImageSequence = Sequence([reference := Dataset()])
    reference.ReferencedSOPInstanceUID = "1.2.3.4"
    for data in (encoded(digitised), encoded(digitised, ImplicitVRLittleEndian)):
        assert read_header(data).kind == "a picture made of another image"


def test_a_compressed_copy_of_a_capture_is_an_image():
    digitised = dataset(RADIOGRAPH, SOPClassUID=SECONDARY_CAPTURE, SourceImageSequence=Sequence([Dataset()]))
    [reference] = digitised.SourceImageSequence
    reference.PurposeOfReferenceCodeSequence = Sequence([purpose := Dataset()])
    for code, kind in (("121320", "image"), ("121322", "a picture made of another image")):
        purpose.CodeValue = code
        assert read_header(encoded(digitised)).kind == kind


def test_a_radiograph_may_have_a_source():
    made = dataset(RADIOGRAPH, SourceImageSequence=Sequence([reference := Dataset()]))
    reference.ReferencedSOPInstanceUID = "1.2.3.4"  # the raw image of the detector
    assert read_header(encoded(made)).kind == "image"


def test_a_stream_that_fails_is_not_called_damaged():
    class FailingStream(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 200:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    with pytest.raises(OSError, match="Input/output error"):
        read_header(FailingStream(encoded(dataset(RADIOGRAPH))))


@pytest.mark.parametrize(
    "elements", [{"PresentationIntentType": "FOR PROCESSING"}, {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1.1"}]
)
def test_raw_detector_images_are_refused(elements: dict[str, str]):
    data = encoded(dataset(RADIOGRAPH, **elements))
    assert read_header(data).for_processing
    with pytest.raises(Rejected, match="raw detector image, FOR PROCESSING: export the images that are FOR PRESENT"):
        decode_dicom(data)


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"Rows": 0}, "without Rows"),
        ({"Columns": None}, "without Columns"),
        ({"BitsStored": None}, "without BitsStored"),
        ({"Rows": 65}, "truncated"),
        ({"Rows": 65535, "Columns": 65535}, "65535 x 65535 pixels, over the limit of 100,000,000"),
        ({"PhotometricInterpretation": NAME}, "an unknown photometric interpretation"),
        ({"WindowCenter": float("nan"), "WindowWidth": 5}, "WindowCenter is no number"),
        ({"WindowCenter": 5, "WindowWidth": 5, "VOILUTFunction": NAME}, "a DICOM window of an unknown function"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "a rescale slope of 0"),
        ({"RescaleSlope": float("inf"), "RescaleIntercept": 0}, "RescaleSlope is no number"),
        ({"VOILUTSequence": lut(0, [1, 2], 99)}, "a LUT shorter than it says"),
        ({"PixelAspectRatio": [1, 100]}, "pixels 100 times as long as wide"),
        ({"PixelData": None}, "not an image: a DICOM object without pixels"),
        ({"SamplesPerPixel": 2}, "truncated"),
        ({"BitsAllocated": 13}, "the DICOM pixels cannot be read"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # pydicom's own, while the file is written
def test_malformed_values_are_refused(elements: dict, reason: str):
    data = encoded(dataset(RADIOGRAPH, **elements))
    with pytest.raises(Rejected, match=reason) as refused:
        decode(data, 32)
    assert NAME not in str(refused.value)


def test_a_transfer_syntax_that_is_not_read_is_named():
    made = dataset(RADIOGRAPH)
    made.PixelData = encapsulate([bytes(100)])
    with pytest.raises(Rejected, match="MPEG2 Main Profile / Main Level: a compression that is not read"):
        decode(encoded(made, MPEG2MPML), 32)


def test_a_frame_that_claims_other_sides_is_not_decompressed(tmp_path: Path):
    for syntax, marker, offset in ((JPEG2000Lossless, b"\xff\x4f\xff\x51", 8), (JPEGLossless, b"\xff\xc3", 5)):
        data = bytearray(compressed(dataset(RADIOGRAPH), syntax, tmp_path))
        struct.pack_into(">I" if offset == 8 else ">H", data, data.index(marker) + offset, 60_000)
        with pytest.raises(Rejected, match="compressed pixels of other sides"):
            decode(bytes(data), 32)


def test_a_deflated_bomb_is_not_inflated(monkeypatch):
    monkeypatch.setattr(dicom_module, "MAX_BYTES", 10**6)
    data = encoded(dataset(np.zeros((1000, 1000), np.uint16)), DeflatedExplicitVRLittleEndian)
    with pytest.raises(Rejected, match="more than 1,000,000 bytes when inflated"):
        read_header(data)


@pytest.mark.parametrize("syntax", [*LOSSLESS, JPEGExtended12Bit, JPEGBaseline8Bit, HTJ2K], ids=lambda uid: uid.name)
def test_damaged_files_raise_no_other_error(syntax: str, tmp_path: Path):
    values, bits = (SHOWN, 8) if syntax == JPEGBaseline8Bit else (RADIOGRAPH, 12)
    whole = compressed(dataset(values, bits, PatientName=NAME), syntax, tmp_path)
    generator = np.random.default_rng(0)
    for number in range(60):
        data = bytearray(whole)
        for position in generator.integers(132, len(data), 4):
            data[position] = generator.integers(256)
        with suppress(Rejected):
            assert decode(bytes(data[: None if number % 3 else generator.integers(132, len(data))]), 32)


@pytest.mark.filterwarnings("ignore:Invalid value")  # pydicom's own, while the file is written
def test_no_reason_and_no_log_repeats_a_value_of_the_file(caplog):
    made = dataset(RADIOGRAPH)
    for keyword in ("PatientName", "PatientID", "StudyDescription", "Modality", "BodyPartExamined", "VOILUTFunction"):
        setattr(made, keyword, NAME)
    data = encoded(made)
    caplog.clear()
    generator, reasons = np.random.default_rng(1), set()
    for _ in range(300):
        damaged = bytearray(data)
        for position in generator.integers(132, len(data) - RADIOGRAPH.nbytes, 6):
            damaged[position] = generator.integers(256)
        for function in (read_header, decode_dicom):
            try:
                function(bytes(damaged))
            except Rejected as error:
                reasons.add(str(error))
    assert len(reasons) > 4
    assert caplog.records == []
    assert not [reason for reason in reasons if NAME.lower()[:5] in reason.lower()]


def test_values_of_the_wrong_type_warn_nobody():
    data = encoded(dataset(RADIOGRAPH, KVP="50", NumberOfFrames="2", PatientAge="050Y"))
    for old, new in ((b"50", b"xx"), (b"2 ", b"y "), (b"050Y", b"\xff\xfe\xfd\xfc")):
        data = data.replace(old, new)
    header = read_header(data)
    assert (header.traits["kvp"], header.traits["age"], header.frames) == ("", "", 1)


def test_run_length_and_jpeg_ls_keep_a_high_range(tmp_path: Path):
    deep = radiograph(16)
    expected = np.round(deep / 257)
    for syntax in (RLELossless, JPEGLSLossless, JPEGLosslessSV1):
        picture = np.asarray(decode_dicom(compressed(dataset(deep, 16), syntax, tmp_path))[0])
        assert np.array_equal(picture, expected)


def test_a_picture_is_the_same_in_dicom_and_in_png():
    for values in (RADIOGRAPH, RADIOGRAPH // 8 + 1000, radiograph(16), RADIOGRAPH // 32):
        file = io.BytesIO()
        Image.fromarray(values).save(file, "png")
        assert np.array_equal(decode(file.getvalue(), 64).pixels, decode(encoded(dataset(values, 16)), 64).pixels)
