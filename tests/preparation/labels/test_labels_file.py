import io
import re
import sys
import unicodedata
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from fracture.config import DataConfig
from fracture.errors import UsageError
from fracture.labels import FRACTURE, NORMAL
from fracture.preparation.labels.class_words import ClassWords
from fracture.preparation.labels.labels_file import FileIdentity, LabelsFile, read_labels_file
from fracture.storage import storage_path

PATHS = ("a.png", "b.png", "sub/c.png")
LABELS = "path,label,patient,source\na.png,Fracture,p1,north\nb.png,0,p1,north\nsub/c.png,normal,,\n"


@pytest.fixture
def read(tmp_path: Path):
    """Write a labels file, and read it for a folder that holds these paths."""

    def read_content(
        content: str | bytes, paths: Sequence[str] = PATHS, config: DataConfig | None = None, **options: Any
    ) -> LabelsFile:
        file = tmp_path / "labels.csv"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_labels_file(
            storage_path(file), paths, ClassWords(config or DataConfig()), **{"max_unmatched": 0.05, **options}
        )

    return read_content


def labels_of(result: LabelsFile) -> dict[str, int]:
    return {file.path: file.label for file in result.labelling.files}


def xlsx(sheets: Mapping[str, Iterable[Sequence[Any]]], formats: Mapping[str, str] | None = None) -> bytes:
    """Return a workbook of these sheets; `formats` gives number formats of cells of the last one."""
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(list(row))
    for cell, number_format in (formats or {}).items():
        sheet[cell].number_format = number_format
    data = io.BytesIO()
    book.save(data)
    return data.getvalue()


def test_a_labels_file_gives_label_patient_and_source(read):
    result = read(LABELS, [*PATHS, "not-named.png"])
    assert [(f.path, f.label, f.patient, f.study, f.origin) for f in result.labelling.files] == [
        ("a.png", FRACTURE, "p1", "", "north"),
        ("b.png", NORMAL, "p1", "", "north"),
        ("sub/c.png", NORMAL, "", "", ""),
    ]
    assert result.labelling.words == {"fracture": ["Fracture"], "normal": ["0", "normal"]}
    assert result.unlabelled == ["not-named.png"]
    assert result.key == "path"
    assert (result.unmatched_rows, result.repeated_rows, result.ignored_columns) == ([], [], [])


def test_the_labels_file_itself_is_no_image_without_a_row(read, tmp_path):
    assert read(LABELS, [*PATHS, "labels.csv"], root=str(tmp_path)).unlabelled == []


SEMICOLONS = LABELS.replace(",", ";")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(LABELS, id="comma"),
        pytest.param(SEMICOLONS, id="semicolon"),
        pytest.param(LABELS.replace(",", "\t"), id="tab"),
        pytest.param(LABELS.replace(",", "|"), id="vertical bar"),
        pytest.param(LABELS.encode("utf-8-sig"), id="UTF-8 with BOM"),
        pytest.param(LABELS.replace(",", "\t").encode("utf-16"), id="UTF-16"),
        pytest.param("\ufeff".encode("utf-16-be") + LABELS.encode("utf-16-be"), id="UTF-16, big end first"),
        pytest.param(LABELS.replace("\n", "\r\n"), id="CRLF"),
        pytest.param(LABELS.replace("\n", "\r"), id="CR"),
        pytest.param(LABELS.rstrip("\n"), id="no end of the last line"),
        pytest.param(f"sep=;\r\n{SEMICOLONS}", id="sep="),
        pytest.param(f'"sep=;"\n{SEMICOLONS}', id="sep= in quotes"),
        pytest.param(f"sep=^\n{LABELS.replace(',', '^')}", id="another separator by sep="),
        pytest.param(f"sep=;\n{SEMICOLONS}".encode("utf-16"), id="sep= in UTF-16"),
        pytest.param(re.sub(r"[^,\n]+", r'"\g<0>"', LABELS), id="quoted"),
        pytest.param(LABELS.replace("\n", "\n\n"), id="empty rows"),
        pytest.param(LABELS + ",\n,,,\n ,\t,,\n", id="rows of separators alone at the end"),
        pytest.param(LABELS.replace("\n", ",,,\n"), id="separators at the end of each row, as Excel leaves them"),
        pytest.param("Worklist of the clinic\n\n" + LABELS, id="a title above"),
        pytest.param("Export of;03.02.2024\n\n" + SEMICOLONS, id="a title of two cells above"),
        pytest.param(LABELS.replace("path,label,patient", " Path , LABEL,Patient_ID"), id="capitals and spaces"),
        pytest.param(LABELS.replace("path,label,patient,source", "Datei,Befund,Patienten-Nr.,Klinik"), id="German"),
        pytest.param(LABELS.replace("path,label", "File name,Fracture (0/1)"), id="remarks in brackets"),
        pytest.param(LABELS.replace("sub/c.png,normal,,", "sub/c.png,normal"), id="a row that ends early"),
    ],
)
def test_a_table_as_people_keep_it(read, content):
    result = read(content)
    assert labels_of(result) == {"a.png": FRACTURE, "b.png": NORMAL, "sub/c.png": NORMAL}
    assert [(f.patient, f.origin) for f in result.labelling.files] == [("p1", "north"), ("p1", "north"), ("", "")]
    assert (result.unmatched_rows, result.ignored_columns) == ([], [])


def test_a_quoted_value_holds_separators_quotes_and_lines(read):
    result = read(
        'path,label,comment\n"a,""1"".png",1,"two\nlines"\nb.png,0,\nx.png,0,\n',
        ['a,"1".png', "b.png"],
        max_unmatched=0.5,
    )
    assert labels_of(result) == {'a,"1".png': FRACTURE, "b.png": NORMAL}
    assert result.unmatched_rows == [4], "as a spreadsheet counts, which shows two lines as one row"


@pytest.mark.parametrize(
    ("content", "row"),
    [
        (LABELS + "x.png,1\n", 5),
        (f"sep=;\n{SEMICOLONS}x.png;1\n", 6),
        (LABELS.replace("\n", "\n\n") + "x.png,1\n", 9),
        ("A title\n" + LABELS + "x.png,1\n", 6),
        (xlsx({"a": [["path", "label"], [], ["a.png", 1], ["b.png", 0], ["x.png", 0]]}), 5),
    ],
)
def test_rows_are_counted_as_a_spreadsheet_shows_them(read, content, row: int):
    assert read(content, max_unmatched=0.5).unmatched_rows == [row]


def test_umlauts_in_windows_1252(read):
    result = read("Datei;Befund;Klinik\nRöntgen_01.png;unauffällig;Köln\n".encode("cp1252"), ["Röntgen_01.png"])
    assert [(f.path, f.label, f.origin) for f in result.labelling.files] == [("Röntgen_01.png", NORMAL, "Köln")]


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "utf-16"])
def test_a_file_name_that_is_no_utf_8(read, encoding):
    """The disk holds `ö` as the byte F6, which Python reads as a surrogate escape."""
    path = b"R\xf6ntgen_01.png".decode("utf-8", "surrogateescape")
    assert labels_of(read("path,label\nRöntgen_01.png,1\n".encode(encoding), [path])) == {path: FRACTURE}


def test_bytes_of_file_names_as_a_script_lists_them(read):
    """One name in UTF-8, one in Windows-1252 and one in DOS' encoding, whose ü is no character of either."""
    names = ["Röntgen.png".encode(), b"R\xf6ntgen_2.png", b"f\x81nf.png"]
    content = b"path,label\n" + b"".join(name + b",1\n" for name in names)
    assert len(read(content, [name.decode("utf-8", "surrogateescape") for name in names]).labelling.files) == 3


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("in_file", ["NFC", "NFD"])
def test_any_unicode_form(read, on_disk, in_file):
    path = unicodedata.normalize(on_disk, "Brüche/Röntgen.png")
    assert labels_of(read(unicodedata.normalize(in_file, "path,label\nBrüche/Röntgen.png,1\n"), [path])) == {path: 1}


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("sub/c.png", "sub/c.png"),
        ("./sub/c.png", "sub/c.png"),
        (r"sub\c.png", "sub/c.png"),
        (r".\sub\c.png", "sub/c.png"),
        ("sub/c", "sub/c.png"),
        ("SUB/C.PNG", "sub/c.png"),
        ("Sub/C", "sub/c.png"),
        ("/data/xray/sub/c.png", "sub/c.png"),
        (r"\data\xray\sub\c", "sub/c.png"),
        (" sub/c.png ", "sub/c.png"),
        ("c.png", "sub/c.png"),
        ("c", "sub/c.png"),
        ("C.PNG", "sub/c.png"),
        ("b.png", "b.png"),
        ("1.2.840.113", "sub/1.2.840.113"),
        ("1.2.840.114", "sub/1.2.840.114.dcm"),
    ],
)
def test_ways_to_name_a_path(read, key, path):
    paths = ["a.png", "b.png", "sub/c.png", "sub/1.2.840.113", "sub/1.2.840.114.dcm"]
    result = read(f"path,label\n{key},1\n", paths, root="/data/xray")
    assert labels_of(result) == {path: FRACTURE}
    assert result.key == "path"
    assert len(result.unlabelled) == 4


def test_the_exact_form_is_taken_before_a_loose_one(read):
    paths = ["A.png", "a.png", "a", "sub/a.png", " b.png", "b.png", unicodedata.normalize("NFD", "ö.png"), "ö.png"]
    for path in paths:
        assert labels_of(read(f'path,label\n"{path}",1\n', paths)) == {path: FRACTURE}


@pytest.mark.parametrize(
    "key",
    [
        *("../../etc/passwd", "/etc/passwd", "sub/../../secret.png", "..", ".", "/", "sub/..", "../a.png"),
        *(r"C:\secret.png", r"..\secret.png", "file:///etc/passwd", "s3://bucket/a.png", "/data/xrays/a.png", "/a.png"),
        *("sub", "sub/", "1.2.840", ".png", "png", "*.png", ""),
    ],
)
def test_keys_that_name_no_image_of_the_folder(read, key):
    result = read(f"{LABELS}{key},normal\n", [*PATHS, "1.2.840.113"], root="/data/xray", max_unmatched=0.5)
    assert result.unmatched_rows == [5]
    assert len(result.labelling.files) == 3


@pytest.mark.parametrize(
    ("key", "paths", "message"),
    [
        ("c.png", ["x/c.png", "y/c.png"], r"row 2: the value of 'path' \('c.png'\) names 2 files, 'x/c.png' and 'y/c"),
        ("a", ["a.jpg", "a.png", "b.png"], r"names 2 files, 'a.jpg' and 'a.png'. Give the whole path below --data"),
        ("A.png", ["a.PNG", "a.png"], r"names 2 files, 'a.PNG' and 'a.png'"),
    ],
)
def test_a_key_that_several_files_share(read, key, paths, message):
    with pytest.raises(UsageError, match=message):
        read(f"path,label\n{key},1\n", paths)


IDENTITIES = {
    "p1/s1/1.dcm": FileIdentity("1.2.1.1", "1.2.1", "0012", "P1"),
    "p1/s1/2.dcm": FileIdentity("1.2.1.2", "1.2.1", "0012", "P1"),
    "p1/s2/1.dcm": FileIdentity("1.2.2.1", "1.2.2", "12345", "P1"),
    "p2/s3/1.dcm": FileIdentity("1.2.3.1", "1.2.3", "A7", "P2"),
}


@pytest.mark.parametrize(
    ("content", "options", "key", "labels"),
    [
        ("SOPInstanceUID,label\n1.2.1.2,1\n", {}, "instance", {"p1/s1/2.dcm": 1}),
        ("StudyInstanceUID,label\n1.2.1,1\n", {}, "study", {"p1/s1/1.dcm": 1, "p1/s1/2.dcm": 1}),
        ("Study ID,label\n12345,1\n", {}, "accession", {"p1/s2/1.dcm": 1}),
        (
            "Accession No.;Befund\n0012;Fraktur\nA7;keine Fraktur\n",
            {},
            "accession",
            {"p1/s1/1.dcm": 1, "p1/s1/2.dcm": 1, "p2/s3/1.dcm": 0},
        ),
        ("AccessionNumber,label\n12345.0,1\n", {}, "accession", {"p1/s2/1.dcm": 1}),
        ("PatientID,label\nP2,0\n", {}, "patient", {"p2/s3/1.dcm": 0}),
        ("PatientID,AccessionNumber,label\nP1,12345,0\n", {}, "accession", {"p1/s2/1.dcm": 0}),
        ("image_id,label\n1.2.3.1,0\n", {}, "instance", {"p2/s3/1.dcm": 0}),
        ("file,StudyInstanceUID,label\nunknown,1.2.3,0\n", {}, "study", {"p2/s3/1.dcm": 0}),
        ("Nummer;path;label\nA7;x;0\n", {"key": "Nummer"}, "accession", {"p2/s3/1.dcm": 0}),
        ("Nummer,label\n1.2.3,0\n", {"key": "nummer"}, "study", {"p2/s3/1.dcm": 0}),
        ("Nummer,label\np2/s3/1,0\n", {"key": "Nummer"}, "path", {"p2/s3/1.dcm": 0}),
        ("Nummer,label\n1.2.3.1,0\n", {"key": "Nummer"}, "instance", {"p2/s3/1.dcm": 0}),
        ("Nummer,label\nP2,0\n", {"key": "Nummer"}, "patient", {"p2/s3/1.dcm": 0}),
        ("PatientID,AccessionNumber,label\nP2,x,0\n", {"key": "PatientID"}, "patient", {"p2/s3/1.dcm": 0}),
    ],
)
def test_keys_of_dicom_headers(read, content, options, key, labels):
    result = read(content, list(IDENTITIES), identities=IDENTITIES, **options)
    assert (result.key, labels_of(result)) == (key, labels)


NUMBERED = {
    "1.dcm": FileIdentity("1.1", "1", "A1", "2"),
    "2.dcm": FileIdentity("1.2", "2", "A2", "1"),
}


@pytest.mark.parametrize("name", ["PatientID", "Patienten-Nr.", "MRN"])
def test_a_key_column_of_a_known_name_is_what_its_name_says(read, name):
    """Patient 1 is in 2.dcm, and 1.dcm is of patient 2."""
    result = read(f"{name},label\n1,1\n2,0\n", list(NUMBERED), identities=NUMBERED, key=name)
    assert (result.key, labels_of(result)) == ("patient", {"2.dcm": FRACTURE, "1.dcm": NORMAL})
    result = read("file,label\n1,1\n2,0\n", list(NUMBERED), identities=NUMBERED, key="file")
    assert (result.key, labels_of(result)) == ("path", {"1.dcm": FRACTURE, "2.dcm": NORMAL})


def test_a_key_column_of_another_name_that_names_different_images(read):
    with pytest.raises(
        UsageError,
        match=r"row 2: the value of 'Nummer' \('1'\) names different images among paths or file names and among "
        r"patient ids. Rename the column to 'path' or to 'PatientID'\.$",
    ):
        read("Nummer,label\n1,1\n2,0\n", list(NUMBERED), identities=NUMBERED, key="Nummer")
    same = {"1.dcm": FileIdentity(patient="1"), "2.dcm": FileIdentity(patient="2")}
    assert labels_of(read("Nummer,label\n1,1\n", list(same), identities=same, key="Nummer")) == {"1.dcm": FRACTURE}


SHARED = {  # two hospitals have given the number A1
    "n.dcm": FileIdentity("1.1", "1", "A1", "7"),
    "s.dcm": FileIdentity("2.1", "2", "A1", "S9"),
    "x.dcm": FileIdentity("3.1", "3", "A1", ""),
    "y.dcm": FileIdentity("4.1", "4", "A2", "7"),
    "z.dcm": FileIdentity("4.2", "4", "A2", ""),
}


def test_an_accession_number_of_several_patients_labels_only_the_rows_own(read):
    content = "Accession,PatientID,label\nA1,7.0,1\nA1,S9,0\nA2,,1\n"
    result = read(content, list(SHARED), identities=SHARED)
    assert labels_of(result) == {"n.dcm": FRACTURE, "s.dcm": NORMAL, "y.dcm": FRACTURE, "z.dcm": FRACTURE}
    assert result.unlabelled == ["x.dcm"]
    result = read("Accession,PatientID,label\nA1,S8,1\nA2,,1\n", list(SHARED), identities=SHARED, max_unmatched=0.5)
    assert (sorted(labels_of(result)), result.unmatched_rows) == (["y.dcm", "z.dcm"], [2])


@pytest.mark.parametrize(
    ("content", "other"),
    [
        ("Accession,label\nA1,1\nA2,0\n", "'StudyInstanceUID'"),
        ("Accession,PatientID,label\nA1,,1\nA2,7,0\n", "'StudyInstanceUID'"),
        ("Study ID,label\n9,1\n", "paths"),
    ],
)
def test_a_study_of_several_patients_in_a_row_without_one(read, content, other):
    identities = SHARED | {"a.dcm": FileIdentity("9.1", "9", "", "1"), "b.dcm": FileIdentity("9.2", "9", "", "2")}
    with pytest.raises(
        UsageError,
        match=r"row 2: the value of '.*' \('.*'\) is of images of 2 patients. Give the row's patient in a column "
        rf"'PatientID', or name the images by a column of {other}\.$",
    ):
        read(content, list(identities), identities=identities)


def test_the_institution_is_no_origin_of_a_private_export(read):
    content = "path,label,Institution,Klinik,source\na.png,1,Nord,Köln,scanner 1\n"
    result = read(content, private=True)
    assert ([file.origin for file in result.labelling.files], result.ignored_columns) == (
        ["scanner 1"],
        ["3", "4"],
    )
    content = content.replace("source", "comment")
    assert [file.origin for file in read(content, private=True).labelling.files] == [""]
    assert [file.origin for file in read(content).labelling.files] == ["Nord"]


def test_a_uid_that_holds_a_zero_is_not_shortened(read):
    identities = {"a.png": FileIdentity(study="1.2.1"), "b.png": FileIdentity(study="1.5.7")}
    result = read("StudyInstanceUID,label\n1.2.0.1,1\n1.5.7,0\n", identities=identities, max_unmatched=0.5)
    assert (labels_of(result), result.unmatched_rows) == ({"b.png": NORMAL}, [2])


def test_the_key_is_the_first_that_names_enough_images(read):
    """A study's label holds for all its images; where a file names images one by one, those are meant."""
    content = "path,StudyInstanceUID,label\np1/s1/1.dcm,1.2.1,1\np1/s1/2.dcm,1.2.1,0\nx,1.2.2,0\n"
    result = read(content, list(IDENTITIES), identities=IDENTITIES, max_unmatched=0.4)
    assert labels_of(result) == {"p1/s1/1.dcm": 1, "p1/s1/2.dcm": 0}
    assert result.unmatched_rows == [4]


def test_patient_study_and_origin_as_they_stand(read):
    content = "path,label,Patient,Patient ID,Study,Accession,Site,Age\na.png,1,Eva M.,007,s 1,A1,Nord,71\n"
    result = read(content)
    (file,) = result.labelling.files
    assert (file.patient, file.study, file.origin) == ("007", "s 1", "Nord"), "an id before a name"
    assert result.ignored_columns == ["Patient", "Accession", "Age"]


def test_an_accession_number_is_a_study(read):
    (file,) = read("path,label,accession\na.png,1,A1\n").labelling.files
    assert file.study == "A1"


def test_a_label_of_a_patient_has_no_study(read):
    content = "PatientID,Exam,label\nP1,s1,1\nP1,s2,1\nP2,s3,0\n"
    result = read(content, list(IDENTITIES), identities=IDENTITIES, key="PatientID")
    assert {(file.patient, file.study) for file in result.labelling.files} == {("P1", ""), ("P2", "")}
    assert (len(result.labelling.files), result.repeated_rows, result.ignored_columns) == (4, [3], ["Exam"])


@pytest.mark.parametrize("word", ["1.0", "1", "TRUE", "yes", "Ja", "positive", "Fraktur", "study1_positive"])
def test_words_for_fracture(read, word):
    assert labels_of(read(f"path,label\na.png,{word}\n")) == {"a.png": FRACTURE}


def test_a_labels_file_may_have_its_own_words(read):
    swapped = DataConfig(fracture_labels=("0",), normal_labels=("1",), excluded_labels=("unclear", "n/a"))
    result = read("path,label\na.png,1\nb.png,0\nsub/c.png,Unclear\n", config=swapped)
    assert labels_of(result) == {"a.png": NORMAL, "b.png": FRACTURE}
    assert result.labelling.left_out == {"excluded by data.excluded_labels": 1}
    assert result.unlabelled == []


def test_a_row_without_a_label_leaves_its_image_out(read):
    result = read("path,label\na.png,\nb.png,0\nsub/c.png\n")
    assert labels_of(result) == {"b.png": NORMAL}
    assert result.labelling.left_out == {"without a label": 2}
    assert read("path,label\na.png,\na.png,1\n").labelling.left_out == {}, "another row has the label"


def test_copied_rows_are_counted(read):
    result = read(LABELS + "a.png,1,p1,north\n./a.png,yes,p1,north\n")
    assert result.repeated_rows == [5, 6]
    assert len(result.labelling.files) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "a.png,normal,p1,north",
            r"rows 2 and 5 name the same image \('a.png'\), with .* 'label', 'Fracture' and 'normal'. Correct",
        ),
        ("./A.png,normal,p1,north", r"rows 2 and 5 name the same image \('a.png'\)"),
        ("a.png,1,p2,north", r"with different values of 'patient', 'p1' and 'p2'"),
        ("a.png,1,p1,", r"with different values of 'source', 'north' and ''"),
        ("a.png,unclear,p1,north", r"with different values of 'label', 'Fracture' and 'unclear'"),
    ],
)
def test_rows_that_contradict_each_other(read, row, message):
    with pytest.raises(UsageError, match=message):
        read(f"{LABELS}{row}\n", config=DataConfig(excluded_labels=("unclear",)))


def test_a_study_of_two_labels(read):
    with pytest.raises(UsageError, match=r"rows 2 and 3 .*, or name a column of paths with --key COLUMN"):
        read("StudyInstanceUID,label\n1.2.1,1\n1.2.1,0\n", list(IDENTITIES), identities=IDENTITIES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "pfat;label\na.png;1\n",
            r"no column names the images, .* are 'pfat', 'label'. 'pfat' may be it: name it with --key 'pfat'",
        ),
        ("number,label\na.png,1\n", r"its columns are 'number', 'label'. Name the column with --key COLUMN"),
        (
            "path,lable\na.png,1\n",
            r"no column holds the label, .* columns are 'path', 'lable'. 'lable' may be it: rename it to 'label'",
        ),
        ("path,side\na.png,1\n", r"its columns are 'path', 'side'. Rename the column of labels to 'label'"),
        (
            "path,Befund,Fraktur\na.png,1,1\n",
            r"columns 'Befund', 'Fraktur' may each be the label. Rename the one that says fracture or .* to 'label'",
        ),
        ("a.png,1\nb.png,0\n", r"no column names the images, .*; its columns are 'a.png', '1'"),
        (
            "path label\na.png 1\n",
            r"a single column \('path label'\), or separated by something .* comma, semicolon, tab, vertical bar. Save",
        ),
        ('"path,label"\n"a.png,1"\n', r"first row is a single column \('path,label'\)"),
        (
            LABELS.replace("source", "patient"),
            r"'patient' names two columns, and only one would be read. Remove or rename",
        ),
        (LABELS.replace("patient", "Label"), r"'label' names two columns"),
        (
            "path,label\na.png,1\nb.png,0,p7\n",
            r"row 3: has a value in column 3, which has no name in row 1. Name every column there, or quote",
        ),
        ("path,label,\na.png,1,p7\nb.png,0,p7\n", r"row 2: has a value in column 3, which has no name"),
        (",path,label\np7,a.png,1\np7,b.png,0\n", r"row 2: has a value in column 1, which has no name"),
        (
            'path,label\n"a.png,1\nb.png,0\n',
            r"row 2: not readable as CSV with the separator comma: .* Close the quotes",
        ),
        ('sep=^\npath^label\n"a.png"x^1\n', r"row 3: not readable as CSV with the separator '\^'"),
        ("path,label\n", r"names no image; there is no row below the header. Add one for each image"),
        ("", r"the file is empty. Its first row names the columns"),
        (" \n;;\n", r"the file is empty"),
        (
            "path,label\n".encode("utf-16-le"),
            r"no text, or UTF-16 without a byte order mark. Save it as .xlsx or as CSV in UTF-8",
        ),
        (f"{LABELS}a.png\0,normal\n", r"no text, or UTF-16 without"),
        (
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
            r"an old .xls, or locked by a password. Save it as .xlsx without one, or as CSV",
        ),
        (b"PK\x03\x04", r"not readable as .xlsx. Save it anew as .xlsx, or as CSV in UTF-8"),
        (
            LABELS.replace("Fracture", "fractrue"),
            r"column 'label' has 1 word of no known class: row 2 \('fractrue'\), near 'fracture'. .*excluded_labels",
        ),
        (
            "path,label\n" + "".join(f"{path},word {i}\n" for i, path in enumerate([*PATHS, "d", "e", "f"])),
            r"has 6 words of no known class: row 2 \('word 0'\), .*row 6 \('word 4'\) and 1 more\.",
        ),
        ("path,label\na.png,two\nb.png,two\n", r"has 1 word of no known class: row 2 \('two'\)"),
        (
            f"path,label\na.png,{'The radius is broken. ' * 9}\n",
            r"row 2 \('The radius is broken. The radius is broken. The radius is br…'\)",
        ),
    ],
)
def test_a_labels_file_with_a_mistake(read, content, message):
    with pytest.raises(UsageError, match=message) as error:
        read(content, [*PATHS, "d", "e", "f"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "Acc Nr.",
            r"no column is called --key 'Acc Nr.'; its columns are 'Acc-Number', .*, 'x'. Is 'Acc-Number' meant\?",
        ),
        ("patient", r"no column is called --key 'patient'; its columns are .* Name one of its columns"),
        ("x", r"--key 'x' names two columns. Rename one of them"),
    ],
)
def test_a_key_column_that_is_not_there_or_there_twice(read, key, message):
    with pytest.raises(UsageError, match=message):
        read("Acc-Number,label,x,x\na.png,1,,\n", key=key)


def test_a_count_of_rows_without_a_name_is_ignored(read):
    """Pandas writes it before each row."""
    assert labels_of(read(",path,label\n0,a.png,1.0\n3,b.png,0.0\n")) == {"a.png": FRACTURE, "b.png": NORMAL}


def test_the_exact_name_label_is_taken_before_others(read):
    result = read("path,class,label\na.png,x,1\n")
    assert labels_of(result) == {"a.png": FRACTURE}
    assert result.ignored_columns == ["class"]


def test_rows_that_name_no_image_up_to_a_limit(read):
    content = "path,label\n" + "".join(f"{i}.png,1\n" for i in range(40))
    result = read(content, [f"{i}.png" for i in range(38)])
    assert result.unmatched_rows == [40, 41]
    with pytest.raises(
        UsageError,
        match=r"3 of 40 rows name no image, over the limit of 5%: row 39 \('37.png'\), row 40 \('38.png'\), row 41 "
        r"\('39.png'\). Column 'path' was read as paths or file names, SOP instance UIDs, and --data holds '0.png' and "
        r"'1.png'. Correct these rows, name another column with --key COLUMN, or raise data.max_unmatched_fraction\.",
    ):
        read(content, [f"{i}.png" for i in range(37)])


def test_no_row_names_an_image(read):
    with pytest.raises(UsageError, match=r"none of the 6 rows names an image: row 2 \('x/0.png'\), .* and 1 more\. "):
        read("path,label\n" + "".join(f"x/{i}.png,1\n" for i in range(6)), max_unmatched=0.9)


def test_zeros_that_a_spreadsheet_dropped_are_named(read):
    with pytest.raises(UsageError, match=r"1 of them would but for zeros at the start, which spreadsheets drop: keep"):
        read("AccessionNumber,label\n12,1\n", list(IDENTITIES), identities=IDENTITIES)


PRIVATE = "Meier"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "AccessionNumber,label\nMeier,1\n",
            r"^--labels: none of the 1 rows names an image: row 2. Column 'AccessionNumber' was read as acc.* UIDs\. ",
        ),
        ("path,label\nMeier/1.dcm,Meier\n", r"^--labels: column 'label' has 1 word of no known class: row 2. Say"),
        ("path,label\nMeier/1.dcm,fractureMeier\n", r"has 1 word of no known class: row 2, near 'fracture'"),
        ("path,label\n1.dcm,1\n", r"row 2: the value of 'path' names 2 files. Give"),
        (
            "path,label,patient\nMeier/1.dcm,1,Meier\nMeier/1.dcm,1,X\n",
            r"rows 2 and 3 name the same image, with different values of 'patient'. Correct",
        ),
        ("Meier,1\nMeier,0\n", r"no column names the images, .*; no value of its first row is a known name"),
        ("Meier,fracture\nMeier,normal\n", r"no value of its first row is a known name"),
        ("path,Meyer\nMeier,1\n", r"no column holds the label, .*; its columns are 'path', 'Meyer'"),
        ("Meier\n", r"the first row is a single column, or separated"),
        ("path,label\nMeier,1,Meier\n", r"row 2: has a value in column 3"),
        ('path,label\n"Meier,1\n', r"row 2: not readable as CSV"),
        (b"PK\x03\x04Meier", r"not readable as .xlsx"),
    ],
)
def test_private_messages_show_no_value_and_no_path(read, content, message):
    paths = {f"{PRIVATE}/1.dcm": FileIdentity("1", "2", PRIVATE[::-1], PRIVATE), "x/1.dcm": FileIdentity()}
    with pytest.raises(UsageError, match=message) as error:
        read(content, list(paths), identities=paths, private=True, root=f"/{PRIVATE}")
    assert PRIVATE not in str(error.value)


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ("Accession,label\nMeier,1\n", None, r"^--labels, row 2: the value of 'Accession' is of images of 2 patients"),
        ("Nr,label\nMeier,1\n", "Nr", r"^--labels, row 2: the value of 'Nr' names different images among paths or "),
    ],
)
def test_private_messages_of_a_key_that_is_not_certain(read, content, key, message):
    identities = {"Meier": FileIdentity(accession="Meier", patient="1"), "b": FileIdentity("", "", "Meier", "2")}
    with pytest.raises(UsageError, match=message) as error:
        read(content, list(identities), identities=identities, private=True, key=key)
    assert PRIVATE not in str(error.value)


def test_a_private_number_before_a_word_is_not_listed(read):
    content = "path,label\na.png,study4711 fracture\nb.png,fracture\n"
    assert read(content).labelling.words["fracture"] == ["fracture", "study4711 fracture"]
    assert read(content, private=True).labelling.words["fracture"] == ["fracture"]


def test_a_workbook_with_numbers(read):
    """Excel stores what looks like a number as one; a format may show zeros at its start."""
    identities = {
        "1": FileIdentity(accession="12345"),
        "2": FileIdentity(accession="0012"),
        "3": FileIdentity(accession="0777"),
        "4": FileIdentity(accession="5"),
    }
    rows = [
        ["Accession", "label", "Patient"],
        [12345, 1, 7],
        ["0012", 0.0, "007"],
        [777, True, 7.0],
        [5.0, "normal", None],
    ]
    content = xlsx({"Sheet": rows}, {"A4": "0000"})
    result = read(content, list(identities), identities=identities)
    assert labels_of(result) == {"1": FRACTURE, "2": NORMAL, "3": FRACTURE, "4": NORMAL}
    assert [file.patient for file in result.labelling.files] == ["7", "007", "7", ""]


def test_the_first_sheet_with_a_header_is_read(read):
    table = [["Worklist"], [], ["file", "label"], ["a.png", 1], ["b.png", 0]]
    other = [["file", "label"], ["a.png", 0]]
    content = xlsx({"Empty": [], "About": [["made by", "us"], ["on", "Monday"]], "Images": table, "Old": other})
    assert labels_of(read(content)) == {"a.png": FRACTURE, "b.png": NORMAL}


def test_a_hidden_sheet_is_not_read(read):
    book = openpyxl.load_workbook(
        io.BytesIO(xlsx({"Old": [["file", "label"], ["a.png", 0]], "New": [["file", "label"], ["a.png", 1]]}))
    )
    book["Old"].sheet_state = "hidden"
    data = io.BytesIO()
    book.save(data)
    assert labels_of(read(data.getvalue())) == {"a.png": FRACTURE}


def test_a_workbook_without_openpyxl(read, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(
        UsageError, match=r".xlsx needs openpyxl, which is not installed here: pip install 'fracture\[excel\]'"
    ):
        read(xlsx({"a": [["path", "label"]]}))


def test_a_workbook_that_unfolds_to_gigabytes_is_not_read(read):
    data = bytearray(xlsx({"a": [["path", "label"]]}))
    size = data.index(b"PK\x01\x02") + 24  # of the first file of the archive, in its central directory
    data[size : size + 4] = (2**30).to_bytes(4, "little")
    with pytest.raises(UsageError, match=r"unfolds to 1,0.* bytes, over the limit of 536,870,912. Save it as CSV"):
        read(bytes(data))


@pytest.mark.parametrize("column", ["IW", "XFD"])
def test_a_workbook_with_a_value_in_a_far_column(read, column):
    """Each row of a small file with a cell in Excel's last column takes 150 KB when it is read."""
    book = openpyxl.load_workbook(io.BytesIO(xlsx({"a": [["path", "label"], ["a.png", 1], ["b.png", 0]]})))
    book.active[f"{column}3"].number_format = "0000"  # an empty cell, as formats of whole rows leave them
    data = io.BytesIO()
    book.save(data)
    assert labels_of(read(data.getvalue())) == {"a.png": FRACTURE, "b.png": NORMAL}
    book.active[f"{column}3"] = "x"
    book.save(data := io.BytesIO())
    with pytest.raises(UsageError, match=r"row 3: has a value beyond column 256. Keep only the columns of keys"):
        read(data.getvalue())


def test_a_sheet_of_more_values_than_memory_has(read, monkeypatch):
    monkeypatch.setattr("fracture.preparation.labels.spreadsheet.MOST_VALUES", 5)
    content = xlsx({"a": [["path", "label"], ["a.png", 1], ["b.png", 0]]})
    with pytest.raises(UsageError, match=r"row 3: the sheet has more than 5 values. Keep only the columns of keys"):
        read(content)


def test_a_workbook_of_something_else(read):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("content.xml", "<office/>")
    with pytest.raises(UsageError, match=r"not readable as .xlsx"):
        read(data.getvalue())


def test_an_immense_labels_file_is_not_read(tmp_path):
    with (tmp_path / "labels.csv").open("wb") as file:
        file.truncate(2**40)  # a hole, which takes no room on the disk
    with pytest.raises(UsageError, match=r"labels.csv has 1,099,511,627,776 bytes, over the limit"):
        read_labels_file(storage_path(tmp_path / "labels.csv"), PATHS, ClassWords(DataConfig()), max_unmatched=0.05)


@pytest.mark.parametrize(("name", "reason"), [("nowhere.csv", "no such file"), (".", "not a file that can be read")])
def test_a_labels_file_that_is_not_there(tmp_path, name, reason):
    with pytest.raises(UsageError, match=rf"--labels .*: {reason}. Check the path"):
        read_labels_file(storage_path(tmp_path / name), PATHS, ClassWords(DataConfig()), max_unmatched=0.05)
