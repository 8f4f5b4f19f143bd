"""Against programs that others have written: David Clunie's validator, and an Orthanc that runs here, on loopback."""

import io
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from dicomweb_client.web import DICOMwebClient
from highdicom.sr import srread
from pydicom.uid import ComprehensiveSRStorage, SecondaryCaptureImageStorage, XRayAngiographicImageStorage

from fracture.inference.dicom_answer.send import find_web_service, parse_peer, send_cstore, send_stow
from fracture.storage import StoragePath, storage_path
from tests.inference.dicom_answer.conftest import PATIENT, STUDY, write_answer

pytestmark = pytest.mark.long

PLUGINS = ("/usr/share/orthanc/plugins", "/usr/lib/orthanc", "/usr/local/share/orthanc/plugins")
SOURCES: dict[str, dict[str, Any]] = {
    "whole": PATIENT | {"PatientOrientation": ["L", "F"], "ImageLaterality": "R", "Rows": 2000, "Columns": 1600},
    "poor": {},
    "lossy": {
        "LossyImageCompression": "01",
        "LossyImageCompressionRatio": "10",
        "LossyImageCompressionMethod": "ISO_10918_1",
    },
    "odd": {
        "PatientName": "山田^太郎",
        "SpecificCharacterSet": "ISO_IR 192",
        "PatientAge": "074Y",
        "PatientOrientation": "L",
        "SOPClassUID": XRayAngiographicImageStorage,
        "NumberOfFrames": 2,
    },
}


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy: apt-get install dicom3tools")
@pytest.mark.parametrize("source", SOURCES)
def test_dciodvfy_finds_no_error(tmp_path, source: str):
    files = write_answer(storage_path(tmp_path), **SOURCES[source])
    for file, kind in zip(files, ("ComprehensiveSR", "SCImage"), strict=True):
        done = subprocess.run(["dciodvfy", file.path], capture_output=True, text=True, check=True)
        assert kind in done.stderr
        assert "Error" not in done.stderr


@dataclass(frozen=True)
class Orthanc:
    url: str
    peer: str

    def find(self, modality: str) -> list[dict[str, Any]]:
        """Query for instances of the study by QIDO-RS."""
        filters = {"StudyInstanceUID": STUDY, "Modality": modality}
        return self.client.search_for_instances(search_filters=filters, fields=["PatientName"])

    @property
    def client(self) -> DICOMwebClient:
        session = requests.Session()
        session.auth = ("tests", "secret")
        return DICOMwebClient(self.url, session)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def orthanc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Orthanc]:
    plugins = [file for folder in PLUGINS for file in Path(folder).glob("libOrthancDicomWeb.so*")]
    program = shutil.which("Orthanc")
    if program is None or not plugins:
        pytest.skip("needs Orthanc with DICOMweb: apt-get install orthanc orthanc-dicomweb")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("DICOMWEB_TOKEN", raising=False)
    monkeypatch.setenv("DICOMWEB_USER", "tests")
    monkeypatch.setenv("DICOMWEB_PASSWORD", "secret")
    web, dicom = free_port(), free_port()
    settings = {
        "Name": "tests",
        "StorageDirectory": str(tmp_path / "archive"),
        "Plugins": [str(plugins[0])],
        "HttpPort": web,
        "DicomPort": dicom,
        "DicomAet": "ORTHANC",
        "DicomCheckCalledAet": True,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {"tests": "secret"},
        "OverwriteInstances": True,
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (tmp_path / "orthanc.json").write_text(json.dumps(settings))
    with subprocess.Popen([program, str(tmp_path / "orthanc.json")], stderr=subprocess.PIPE, text=True) as server:
        started = any("Orthanc has started" in line for line in server.stderr)
        assert started, "Orthanc ended"
        yield Orthanc(f"http://127.0.0.1:{web}/dicom-web", f"ORTHANC@127.0.0.1:{dicom}")
        server.terminate()


def send(orthanc: Orthanc, files: list[StoragePath], how: str) -> int:
    if how == "STOW":
        return send_stow(find_web_service(orthanc.url), files)
    return send_cstore(parse_peer(orthanc.peer), files)


@pytest.mark.parametrize("how", ["STOW", "C-STORE"])
def test_an_archive_finds_what_is_sent_and_returns_it_readable(orthanc, tmp_path, how: str):
    files = write_answer(storage_path(tmp_path / "answer"), **PATIENT)
    for _ in range(2):  # the second replaces the first
        assert send(orthanc, files, how) == 0
    [report] = orthanc.find("SR")
    [capture] = orthanc.find("OT")
    assert report["00100010"]["Value"][0]["Alphabetic"] == "Doe^Jane"
    assert report["00080016"]["Value"] == [ComprehensiveSRStorage]
    assert capture["00080016"]["Value"] == [SecondaryCaptureImageStorage]
    series, instance = report["0020000E"]["Value"][0], report["00080018"]["Value"][0]
    returned = io.BytesIO()
    orthanc.client.retrieve_instance(STUDY, series, instance).save_as(returned)
    read = srread(io.BytesIO(returned.getvalue()))
    study, *images = read.content.get_image_measurement_groups()
    assert study.get_measurements()[0].value == 0.875
    assert len(images) == 2
