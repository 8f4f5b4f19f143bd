import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fracture.errors import UsageError
from fracture.registry.webhook import check_url, notify


class Hook(HTTPServer):
    """Takes what is posted, after answering with the given codes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.codes: list[int] = []
        self.taken: list[dict] = []
        self.url = f"http://127.0.0.1:{self.server_port}/secret-token"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        code = self.server.codes.pop(0) if self.server.codes else 200
        if code == 200:
            self.server.taken.append(json.loads(body))
        self.send_response(code)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_message_is_posted_as_json(hook: Hook):
    assert notify(hook.url, {"event": "promoted", "version": 3}) is None
    assert hook.taken == [{"event": "promoted", "version": 3}]


def test_a_hook_that_fails_is_asked_again(hook: Hook):
    hook.codes, waits = [503, 429], []
    assert notify(hook.url, {"event": "failed"}, waits.append) is None
    assert (len(hook.taken), waits) == (1, [1.0, 5.0])


def test_nobody_who_listens_is_no_failure_and_the_secret_stays_one(hook: Hook):
    hook.codes = [500, 500, 500]
    assert notify(hook.url, {}, lambda seconds: None) == "127.0.0.1 answers 500"
    hook.codes = [404]
    assert notify(hook.url, {}, lambda seconds: pytest.fail("asked again")) == "127.0.0.1 answers 404"
    hook.server_close()
    told = notify(hook.url, {}, lambda seconds: None)
    assert told.startswith("127.0.0.1 does not answer (")
    assert "secret" not in told


@pytest.mark.parametrize(
    "url",
    [
        "ftp://x/y",
        "hooks.example.org/x",
        "https://",
        "file:///etc/passwd",
        "https://x/a b",
        "http://x:y/z",
        "https://x/é",
    ],
)
def test_what_is_no_web_address_is_refused_unseen(url: str):
    with pytest.raises(UsageError, match=r"--notify, of \d+ characters, is no address of a web hook: it must") as told:
        check_url(url)
    assert url not in str(told.value) or url == "https://"
    check_url("https://hooks.example.org/x")


def test_what_does_not_speak_http_is_no_failure():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(3):
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"hello\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        told = notify(f"http://127.0.0.1:{server.getsockname()[1]}/secret", {}, lambda seconds: None)
        thread.join()
    assert told == "127.0.0.1 does not answer as a web server does (BadStatusLine)"
