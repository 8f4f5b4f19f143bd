"""A web hook on this machine."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer


class Hook(HTTPServer):
    """A server that answers with the given codes, then with 200, and keeps what it accepts."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.codes: list[int] = []
        self.accepted: list[dict] = []
        self.url = f"http://127.0.0.1:{self.server_port}/secret-token"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        code = self.server.codes.pop(0) if self.server.codes else 200
        if code == 200:
            self.server.accepted.append(json.loads(body))
        self.send_response(code)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass
