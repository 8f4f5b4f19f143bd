"""Against a C-STORE provider and a DICOMweb service that run here, on loopback."""

import io
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import (
    ComprehensiveSRStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)
from pynetdicom import AE, evt

from fracture.errors import RunError, UsageError
from fracture.inference.dicom_answer.send import Peer, WebService, find_web_service, parse_peer, send_cstore, send_stow
from fracture.storage import StoragePath, storage_path
from tests.inference.dicom_answer.conftest import PATIENT, write_answer

SECRET = "s3cret/of+the+tests"


@pytest.fixture
def files(tmp_path) -> list[StoragePath]:
    return write_answer(storage_path(tmp_path), **PATIENT)


@pytest.fixture(autouse=True)
def direct_connections(monkeypatch) -> None:
    """No proxy and no credentials of the person who runs the tests."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("DICOMWEB_USER", "DICOMWEB_PASSWORD", "DICOMWEB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@dataclass
class Archive:
    """What an archive has received, and how it answers."""

    url: str = ""
    received: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    status: int = 200
    media_type: str = "application/dicom+json"
    answer: Callable[[Dataset], Any] | None = None  # else that all is stored


def stored(dataset: Dataset, **more: object) -> dict[str, Any]:
    """The answer of PS3.18 for an object that is stored."""
    return {
        "00081199": {
            "vr": "SQ",
            "Value": [
                {
                    "00081150": {"vr": "UI", "Value": [dataset.SOPClassUID]},
                    "00081155": {"vr": "UI", "Value": [dataset.SOPInstanceUID]},
                    **more,
                }
            ],
        }
    }


def failed(dataset: Dataset) -> dict[str, Any]:
    item = stored(dataset)["00081199"]["Value"][0] | {"00081197": {"vr": "US", "Value": [0xA700]}}
    return {"00081198": {"vr": "SQ", "Value": [item]}}


@contextmanager
def web_service(archive: Archive) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            archive.headers.append(dict(self.headers) | {"path": self.path})
            message = message_from_bytes(f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode() + body)
            assert message.get_content_type() == "multipart/related"
            [part] = message.get_payload()
            assert part.get_content_type() == "application/dicom"
            archive.received.append(part.get_payload(decode=True))
            dataset = dcmread(io.BytesIO(archive.received[-1]))
            answer = (archive.answer or stored)(dataset)
            self.send_response(archive.status)
            self.send_header("Content-Type", archive.media_type)
            if archive.status == 307:
                self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        archive.url = f"http://127.0.0.1:{server.server_port}/dicom-web"
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            yield
        finally:
            server.shutdown()


def test_files_are_stored_by_dicomweb_as_they_are(files):
    archive = Archive()
    with web_service(archive):
        assert send_stow(find_web_service(f"{archive.url}/"), files) == 0
    assert archive.received == [file.read_bytes() for file in files]
    assert archive.headers[0]["path"] == "/dicom-web/studies"
    assert archive.headers[0]["Accept"] == "application/dicom+json"
    assert "Authorization" not in archive.headers[0]


@pytest.mark.parametrize(
    ("environment", "header"),
    [
        ({"DICOMWEB_USER": "me", "DICOMWEB_PASSWORD": SECRET}, "Basic bWU6czNjcmV0L29mK3RoZSt0ZXN0cw=="),
        ({"DICOMWEB_TOKEN": SECRET}, f"Bearer {SECRET}"),
    ],
)
def test_credentials_come_from_the_environment(files, monkeypatch, environment: dict[str, str], header: str):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    archive = Archive()
    with web_service(archive):
        service = find_web_service(archive.url)
        send_stow(service, files)
    assert archive.headers[0]["Authorization"] == header
    assert SECRET not in repr(service)


def test_warnings_of_a_web_service_are_counted(files):
    archive = Archive(answer=lambda dataset: stored(dataset, **{"00081196": {"vr": "US", "Value": [0xB000]}}))
    with web_service(archive):
        assert send_stow(find_web_service(archive.url), files) == 2


def test_an_answer_may_name_its_character_set(files):
    archive = Archive(media_type="application/dicom+json; charset=utf-8")
    with web_service(archive):
        assert send_stow(find_web_service(archive.url), files) == 0


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"answer": failed}, "2 of 2 files; the first: failure reason A700. Correct this in the archive, and send"),
        ({"answer": failed, "status": 202}, "2 of 2 files; the first: failure reason A700"),
        ({"answer": failed, "status": 409}, "2 of 2 files; the first: failure reason A700"),
        ({"answer": lambda _: b"refused", "status": 409}, "2 of 2 files; the first: status 409"),
        ({"status": 503, "answer": lambda _: b"later"}, "2 of 2 files; the first: status 503"),
        ({"answer": lambda _: b"", "media_type": "text/html"}, "2 of 2 files; the first: not confirmed: is the URL"),
        ({"answer": lambda _: b"<p>log in", "media_type": "text/html"}, "2 of 2 files; the first: not confirmed: is"),
    ],
)
def test_a_file_that_is_not_confirmed_is_an_error(files, how: dict[str, Any], reason: str):
    archive = Archive(**how)
    with (
        web_service(archive),
        pytest.raises(RunError, match=f"127.0.0.1 has not stored {reason}"),
    ):
        send_stow(find_web_service(archive.url), files)
    assert len(archive.received) == 2, "one failure does not end the sending"


def test_an_answer_that_is_not_json(files):
    archive = Archive(answer=lambda _: b"{")
    with web_service(archive), pytest.raises(RunError, match=r"127.0.0.1 does not answer as a DICOMweb service"):
        send_stow(find_web_service(archive.url), files)


def test_patients_data_are_not_sent_on_to_another_address(files):
    archive = Archive(status=307)
    with web_service(archive), pytest.raises(RunError, match=r"does not answer as .* \(TooManyRedirects\). Send the"):
        send_stow(find_web_service(archive.url), files)
    assert [headers["path"] for headers in archive.headers] == ["/dicom-web/studies"]


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, "answers 401, so it refuses this user. Set DICOMWEB_USER and DICOMWEB_PASSWORD, or DICOMWEB_TOKEN"),
        (404, "answers 404, so nothing can be stored under this URL. Name that of the DICOMweb service"),
    ],
)
def test_a_refusal_names_the_setting(files, status: int, reason: str):
    archive = Archive(status=status)
    with web_service(archive), pytest.raises(UsageError, match=f"--stow: 127.0.0.1 {reason}"):
        send_stow(find_web_service(archive.url), files)
    assert len(archive.received) == 1


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_no_web_service_answers(files):
    with pytest.raises(RunError, match=r"127.0.0.1 does not answer as a DICOMweb service \(ConnectionError\). Send"):
        send_stow(WebService(f"http://127.0.0.1:{unused_port()}"), files)


@pytest.mark.parametrize("url", ["archive", "ftp://archive", "http://", "http://a b", "http://[", "https://ä.example"])
def test_what_is_no_address_of_a_web_service(url: str):
    with pytest.raises(UsageError, match=f"--stow, of {len(url)} characters, is not the address of a DICOMweb service"):
        find_web_service(url)


@pytest.mark.parametrize("url", [f"https://me:{SECRET}@archive.example/rs", f"https://archive.example?token={SECRET}"])
def test_a_secret_in_the_address_is_refused_and_not_repeated(url: str):
    with pytest.raises(UsageError, match=r"--stow: the URL of .* holds a user or a query, which may be a") as caught:
        find_web_service(url.replace("/of+", "-of-"))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "environment",
    [
        {"DICOMWEB_USER": "me"},
        {"DICOMWEB_PASSWORD": SECRET},
        {"DICOMWEB_USER": "me", "DICOMWEB_PASSWORD": SECRET, "DICOMWEB_TOKEN": SECRET},
    ],
)
def test_credentials_that_are_not_complete(monkeypatch, environment: dict[str, str]):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="--stow: set both DICOMWEB_USER and DICOMWEB_PASSWORD in the environment, or"):
        find_web_service("https://archive.example")


@contextmanager
def provider(
    store: Callable[[evt.Event], int],
    classes: tuple[str, ...] = (ComprehensiveSRStorage, SecondaryCaptureImageStorage),
    transfer_syntax: str | None = None,
    title: str = "ARCHIVE",
) -> Iterator[Peer]:
    """A real C-STORE provider, which checks its AE title."""
    entity = AE(title)
    entity.require_called_aet = True
    for sop_class in classes:
        entity.add_supported_context(sop_class, transfer_syntax)
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    try:
        yield Peer("ARCHIVE", "127.0.0.1", server.server_address[1])
    finally:
        server.shutdown()


def keep_in(received: list[Dataset], status: int = 0) -> Callable[[evt.Event], int]:
    def store(event: evt.Event) -> int:
        received.append(event.dataset)
        assert event.assoc.requestor.ae_title == "FRACTURE"
        return status

    return store


def values(dataset: Dataset) -> dict[int, Any]:
    return {element.tag: element.value for element in dataset}


@pytest.mark.parametrize("transfer_syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_files_are_stored_over_one_association(files, transfer_syntax: str):
    received: list[Dataset] = []
    with provider(keep_in(received), transfer_syntax=transfer_syntax) as peer:
        assert send_cstore(peer, files) == 0
    written = [dcmread(io.BytesIO(file.read_bytes())) for file in files]
    assert [*map(values, received)] == [*map(values, written)]


def test_warnings_of_a_provider_are_counted(files):
    with provider(keep_in([], status=0xB000)) as peer:
        assert send_cstore(peer, files) == 2


def test_files_that_a_provider_does_not_store(files):
    received: list[Dataset] = []
    with (
        provider(keep_in(received, status=0xA700)) as peer,
        pytest.raises(
            RunError,
            match=r"ARCHIVE@127.0.0.1:\d+ has not stored 2 of 2 files; the first: status A700. Correct this",
        ),
    ):
        send_cstore(peer, files)
    assert len(received) == 2


def test_a_provider_that_takes_no_reports(files):
    received: list[Dataset] = []
    with (
        provider(keep_in(received), classes=(SecondaryCaptureImageStorage,)) as peer,
        pytest.raises(RunError, match="has not stored 1 of 2 files; the first: it takes no Comprehensive SR Storage"),
    ):
        send_cstore(peer, files)
    assert [dataset.SOPClassUID for dataset in received] == [SecondaryCaptureImageStorage]


def test_a_provider_of_another_title_rejects_the_association(files):
    with (
        provider(keep_in([]), title="OTHER") as peer,
        pytest.raises(RunError, match=r"ARCHIVE@.* rejects the association. Check host, port and AE title, and that"),
    ):
        send_cstore(peer, files)


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # pynetdicom's
def test_no_provider_answers(files):
    with pytest.raises(RunError, match=r"ARCHIVE@127.0.0.1:\d+ does not answer. Check host, port and AE title"):
        send_cstore(Peer("ARCHIVE", "127.0.0.1", unused_port()), files)


def test_a_provider_that_ends_the_association(files):
    def abort(event: evt.Event) -> int:
        event.assoc.abort()
        return 0

    with (
        provider(abort) as peer,
        pytest.raises(RunError, match=r"ARCHIVE@.* has ended the association. Send the files again"),
    ):
        send_cstore(peer, files)


def test_an_archive_is_named_by_title_host_and_port():
    assert parse_peer("ARCHIVE@192.0.2.1:104") == Peer("ARCHIVE", "192.0.2.1", 104)
    assert parse_peer("MY_PACS-2@pacs.example:11112") == Peer("MY_PACS-2", "pacs.example", 11112)
    assert str(parse_peer("A@b:1")) == "A@b:1"


@pytest.mark.parametrize(
    "text", ["ARCHIVE", "@host:104", "A@host", "A@host:0", "A@host:65536", "A@host:x", f"{'A' * 17}@host:1", "A\\B@h:1"]
)
def test_what_is_no_name_of_an_archive(text: str):
    with pytest.raises(UsageError, match=r"--store '.*': name the archive as AET@HOST:PORT, such as ARCHIVE@192.0.2.1"):
        parse_peer(text)
