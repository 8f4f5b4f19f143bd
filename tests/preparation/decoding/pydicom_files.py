"""pydicom's own test files, and what becomes of each; `python -m tests.preparation.decoding.pydicom_files` lists it."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import data_store
import pydicom

from fracture.preparation.decoding.decode import Rejected, decode
from fracture.preparation.decoding.dicom import is_dicom, read_header

FOLDERS = (Path(pydicom.__file__).parent / "data", Path(data_store.__file__).parent / "data")  # nothing is fetched
READ = "read"


def list_files() -> list[Path]:
    """Return the files with the preamble of DICOM that pydicom and pydicom-data bring."""
    files = (path for folder in FOLDERS for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if is_dicom(path.read_bytes()[:132])]


def describe_files() -> Iterator[tuple[str, str]]:
    """Yield what becomes of each file, and its transfer syntax."""
    for path in list_files():
        data = path.read_bytes()
        syntax = pydicom.uid.UID(read_header(data).transfer_syntax)
        try:
            decode(data, 224)
            yield READ, syntax.name or "none"
        except Rejected as error:
            yield str(error), syntax.name or "none"


def make_table() -> str:
    """Return a table in Markdown: what becomes of the files, by transfer syntax."""
    counts = Counter(describe_files())
    results = sorted({result for result, _ in counts}, key=lambda result: (result != READ, result))
    lines = ["| files | result | by transfer syntax |", "|---|---|---|"]
    for result in results:
        syntaxes = {syntax: count for (other, syntax), count in counts.items() if other == result}
        listed = "; ".join(f"{count} {syntax}" for syntax, count in sorted(syntaxes.items(), key=lambda item: -item[1]))
        lines.append(f"| {sum(syntaxes.values())} | {result} | {listed} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(make_table())
