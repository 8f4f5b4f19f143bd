"""An S3 server for the tests: moto's, on a free port of this machine, with failures on request.

  python tests/object_store.py       prints its URL and serves until it is ended

POST /fail?times=2&status=503&code=SlowDown answers the next two requests with that error; with seconds=5 they are
delayed instead. GET /fail returns the number of failures that are left.
"""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

Respond = Callable[[str, list[tuple[str, str]]], Any]


class FailureInjector:
    """A WSGI middleware that makes requests fail or delays them."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._lock = threading.Lock()
        self._times, self._failure = 0, {}

    def __call__(self, environ: dict[str, Any], respond: Respond) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/fail":
            return self._set_failure(environ, respond)
        with self._lock:
            failing = self._times > 0
            self._times -= failing
        if failing and "seconds" in self._failure:
            time.sleep(float(self._failure["seconds"]))
        elif failing:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))  # else the next request begins with it
            body = f"<Error><Code>{self._failure['code']}</Code><Message>as requested</Message></Error>".encode()
            respond(f"{self._failure['status']} as requested", [("Content-Type", "application/xml"), _length(body)])
            return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]
        return self._application(environ, respond)

    def _set_failure(self, environ: dict[str, Any], respond: Respond) -> Iterable[bytes]:
        with self._lock:
            if environ["REQUEST_METHOD"] == "POST":
                self._failure = dict(parse_qsl(environ["QUERY_STRING"]))
                self._times = int(self._failure["times"])
            body = str(self._times).encode()
        respond("200 OK", [_length(body)])
        return [body]


def _length(body: bytes) -> tuple[str, str]:
    return "Content-Length", str(len(body))


if __name__ == "__main__":
    server = make_server(
        "127.0.0.1", 0, FailureInjector(DomainDispatcherApplication(create_backend_app)), threaded=True
    )
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
