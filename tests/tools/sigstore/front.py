"""The address of the transparency log: writes go to Rekor, reads are files, as deployments have it.

Rekor v2 itself does not serve checkpoints and tiles; a web server or a bucket does.
"""

from __future__ import annotations

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Front:
    """Runs in a thread of this process until closed."""

    def __init__(self, rekor_port: int, storage: Path) -> None:
        self._port = rekor_port
        self._storage = storage
        #: So many answers of Rekor do not arrive, from now on.
        self.lost = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://localhost:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        front = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def _answer(self, status: int, body: bytes, **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                file = front._storage / self.path.removeprefix("/api/v2/")
                if file.is_file() and ".." not in self.path:
                    self._answer(200, file.read_bytes(), Content_Type="application/octet-stream")
                else:
                    self._answer(404, b"")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                names = ("Content-Type", "Accept")
                headers = {name: self.headers[name] for name in names if self.headers[name]}
                connection = http.client.HTTPConnection("127.0.0.1", front._port)
                try:
                    connection.request("POST", self.path, body, headers)
                    answer = connection.getresponse()
                    data = answer.read()
                except (OSError, http.client.HTTPException):
                    self._answer(502, b"")
                    return
                finally:
                    connection.close()
                if front.lost:
                    front.lost -= 1
                    self.close_connection = True
                    return
                kept = {
                    name.replace("-", "_"): value
                    for name, value in answer.getheaders()
                    if name.lower() in ("content-type", "x-log-index")
                }
                self._answer(answer.status, data, **kept)

        return Handler
