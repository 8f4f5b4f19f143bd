"""An S3 server for the tests: moto's, on a free port of this machine, which fails when it is told to.

  python tests/object_store.py       prints its URL and serves until it is ended

POST /fail?times=2&status=503&code=SlowDown answers the next two requests so; with seconds=5 they come late instead.
GET /fail says how many are left.
"""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

Respond = Callable[[str, list[tuple[str, str]]], Any]


class Failing:
    """Stands before another WSGI application."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._lock = threading.Lock()
        self._times, self._how = 0, {}

    def __call__(self, environ: dict[str, Any], respond: Respond) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/fail":
            return self._told(environ, respond)
        with self._lock:
            failing = self._times > 0
            self._times -= failing
        if failing and "seconds" in self._how:
            time.sleep(float(self._how["seconds"]))
        elif failing:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))  # else the next request begins there
            body = f"<Error><Code>{self._how['code']}</Code><Message>as the test wants it</Message></Error>".encode()
            respond(f"{self._how['status']} told to", [("Content-Type", "application/xml"), _length(body)])
            return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]
        return self._application(environ, respond)

    def _told(self, environ: dict[str, Any], respond: Respond) -> Iterable[bytes]:
        with self._lock:
            if environ["REQUEST_METHOD"] == "POST":
                self._how = dict(parse_qsl(environ["QUERY_STRING"]))
                self._times = int(self._how["times"])
            body = str(self._times).encode()
        respond("200 OK", [_length(body)])
        return [body]


def _length(body: bytes) -> tuple[str, str]:
    return "Content-Length", str(len(body))


if __name__ == "__main__":
    server = make_server("127.0.0.1", 0, Failing(DomainDispatcherApplication(create_backend_app)), threaded=True)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
