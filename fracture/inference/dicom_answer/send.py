"""Sending an answer to an archive: by DICOMweb (STOW-RS) or by C-STORE.

A file counts as stored only if the archive confirms it. What was sent before an error stays in the archive, and
sending it again replaces it. No message names a patient, a password, or more of a URL than its host.
"""

import io
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import requests
from dicomweb_client.web import DICOMwebClient
from pydicom import Dataset, dcmread
from pydicom.uid import (
    ComprehensiveSRStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)
from pynetdicom import AE
from pynetdicom.status import code_to_category

from fracture.errors import RunError, UsageError
from fracture.storage import StoragePath

AE_TITLE = "FRACTURE"
USER, PASSWORD, TOKEN = "DICOMWEB_USER", "DICOMWEB_PASSWORD", "DICOMWEB_TOKEN"
_TIMEOUT = (10.0, 60.0)  # seconds to connect, and then to receive an answer
_WHOLE = 2**40  # bytes: a body that is sent in chunks has no length, which some archives refuse
_PEER = re.compile(r"(?P<ae_title>[!-?A-\[\]-~]{1,16})@(?P<host>[^@:/\s]+):(?P<port>\d{1,5})", re.ASCII)
_SENT_AGAIN = "Send the files again: what the archive has is replaced"


@dataclass(frozen=True)
class WebService:
    """A DICOMweb service, with the secrets that open it."""

    url: str  # without /studies
    auth: tuple[str, str] | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""


def find_web_service(url: str) -> WebService:
    """Check the address of a DICOMweb service, and find user and password, or token, in the environment.

    Raises:
        UsageError: it is no http or https URL, holds a user or a query, or the environment is not complete.
    """
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid or not url.isascii() or not url.isprintable() or " " in url:
        raise UsageError(
            f"--stow, of {len(url)} characters, is not the address of a DICOMweb service. Name it with http:// or "
            "https://, such as https://archive.example/dicom-web"
        )
    if parts.username is not None or parts.query or parts.fragment:
        raise UsageError(
            f"--stow: the URL of {parts.hostname} holds a user or a query, which may be a secret. Remove it, and set "
            f"{USER} and {PASSWORD}, or {TOKEN}, in the environment."
        )
    user, password, token = (os.environ.get(name) for name in (USER, PASSWORD, TOKEN))
    if bool(user) != bool(password) or (user and token):
        raise UsageError(
            f"--stow: set both {USER} and {PASSWORD} in the environment, or {TOKEN} alone, or none of them."
        )
    return WebService(url.rstrip("/"), (user, password) if user and password else None, token or None)


def send_stow(service: WebService, files: Sequence[StoragePath]) -> int:
    """Store files by STOW-RS, one request each.

    Returns:
        How many the archive has stored with a warning, which usually means that it has changed values.

    Raises:
        UsageError: the archive refuses the user, or the URL is not that of a DICOMweb service.
        RunError: the archive does not answer, or has not confirmed every file.
    """
    with requests.Session() as session:
        session.auth = service.auth
        session.max_redirects = 0  # patients' data go to the host that was named, and to no other
        headers = {"Accept": "application/dicom+json"}
        if service.token:
            headers["Authorization"] = f"Bearer {service.token}"
        client = DICOMwebClient(
            service.url, session, headers=headers, callback=_simplify_media_type, chunk_size=_WHOLE, timeout=_TIMEOUT
        )
        client.set_http_retry_params(retry=False)
        outcomes = [_store(client, service, dcmread(io.BytesIO(file.read_bytes()))) for file in files]
    return _count_warnings(service.host, outcomes)


def _simplify_media_type(response: requests.Response, *_: Any, **__: Any) -> requests.Response:
    """Remove parameters such as the character set, with which dicomweb-client would not read the answer."""
    response.headers["Content-Type"] = response.headers.get("Content-Type", "").partition(";")[0].strip()
    return response


@dataclass(frozen=True)
class _Outcome:
    failure: str = ""  # why a file is not stored; "" if it is
    has_warning: bool = False


def _store(client: DICOMwebClient, service: WebService, dataset: Dataset) -> _Outcome:
    try:
        answer = client.store_instances([dataset])
    except requests.HTTPError as error:
        return _explain_status(service, error.response)
    except (requests.RequestException, ValueError) as error:  # ValueError: an answer that is not JSON
        raise RunError(
            f"{service.host} does not answer as a DICOMweb service ({type(error).__name__}). {_SENT_AGAIN}"
        ) from None
    if failure := _find_failure(answer):
        return _Outcome(failure)
    confirmed = {item.ReferencedSOPInstanceUID: item for item in answer.get("ReferencedSOPSequence") or ()}
    if dataset.SOPInstanceUID not in confirmed:
        return _Outcome("not confirmed: is the URL that of the DICOMweb service?")
    return _Outcome(has_warning="WarningReason" in confirmed[dataset.SOPInstanceUID])


def _find_failure(answer: Dataset) -> str:
    failed = answer.get("FailedSOPSequence")
    return f"failure reason {failed[0].get('FailureReason') or 0:04X}" if failed else ""


def _explain_status(service: WebService, response: requests.Response) -> _Outcome:
    status = response.status_code
    if status in (401, 403):
        raise UsageError(
            f"--stow: {service.host} answers {status}, so it refuses this user. Set {USER} and {PASSWORD}, or {TOKEN}."
        )
    if status in (404, 405):
        raise UsageError(
            f"--stow: {service.host} answers {status}, so nothing can be stored under this URL. Name that of the "
            "DICOMweb service, which often ends in /dicom-web or /rs."
        )
    failure = ""
    if status == HTTPStatus.CONFLICT:
        with suppress(ValueError):  # the answer may be text
            failure = _find_failure(Dataset.from_json(response.json()))
    return _Outcome(failure or f"status {status}")


@dataclass(frozen=True)
class Peer:
    """An archive that takes C-STORE."""

    ae_title: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.ae_title}@{self.host}:{self.port}"


def parse_peer(text: str) -> Peer:
    """Parse `AET@HOST:PORT`.

    Raises:
        UsageError: it is something else.
    """
    match = _PEER.fullmatch(text)
    if match is None or not 0 < int(match["port"]) < 2**16:
        raise UsageError(
            f"--store {text!r:.100}: name the archive as AET@HOST:PORT, such as ARCHIVE@192.0.2.1:104. An AE title has "
            "1 to 16 characters, and a port is 1 to 65535."
        )
    return Peer(match["ae_title"], match["host"], int(match["port"]))


def send_cstore(peer: Peer, files: Sequence[StoragePath]) -> int:
    """Store reports and captures by C-STORE over one association.

    Returns:
        How many the archive has stored with a warning, which usually means that it has changed values.

    Raises:
        RunError: the archive accepts no association, ends it, or has not confirmed every file.
    """
    entity = AE(AE_TITLE)
    entity.connection_timeout = _TIMEOUT[0]
    for sop_class in (ComprehensiveSRStorage, SecondaryCaptureImageStorage):
        entity.add_requested_context(sop_class, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    association = entity.associate(peer.host, peer.port, ae_title=peer.ae_title)
    if not association.is_established:
        what = "rejects the association" if association.is_rejected else "does not answer"
        raise RunError(
            f"{peer} {what}. Check host, port and AE title, and that the archive knows ours, {AE_TITLE}; then send the "
            "files again"
        )
    try:
        outcomes = [_send(association, peer, dcmread(io.BytesIO(file.read_bytes()))) for file in files]
    finally:
        if association.is_established:
            association.release()
    return _count_warnings(str(peer), outcomes)


def _send(association: Any, peer: Peer, dataset: Dataset) -> _Outcome:
    if not association.is_established:
        raise RunError(f"{peer} has ended the association. {_SENT_AGAIN}")
    try:
        status = association.send_c_store(dataset)
    except ValueError:  # no presentation context
        return _Outcome(f"it takes no {dataset.SOPClassUID.name}")
    if "Status" not in status:
        raise RunError(f"{peer} has ended the association. {_SENT_AGAIN}")
    category = code_to_category(status.Status)
    if category in ("Success", "Warning"):
        return _Outcome(has_warning=category == "Warning")
    return _Outcome(f"status {status.Status:04X}")


def _count_warnings(archive: str, outcomes: Sequence[_Outcome]) -> int:
    failures = [outcome.failure for outcome in outcomes if outcome.failure]
    if failures:
        raise RunError(
            f"{archive} has not stored {len(failures):,} of {len(outcomes):,} files; the first: {failures[0]}. Correct "
            "this in the archive, and send the files again"
        )
    return sum(outcome.has_warning for outcome in outcomes)
