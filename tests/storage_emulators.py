# SPDX-License-Identifier: Apache-2.0
"""Google's and Amazon's storage services on loopback, and a proxy that lets them misbehave.

Each emulator is a process of its own: what it imports warns, and warnings are errors here.
"""

import collections
import contextlib
import dataclasses
import functools
import http.client
import http.server
import json
import pathlib
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator

import tensorstore as ts

BUCKET = "models"
# Nagle's algorithm adds 40 ms to each answer that is written in two parts.
_PROGRAM = """
import os, socketserver, sys
socketserver.StreamRequestHandler.disable_nagle_algorithm = True
port = {port}
{start}
print("up", flush=True)
sys.stdin.read()
os._exit(0)
"""
_STARTS = {
    "gs": f"""
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", port, in_memory=True, default_bucket={BUCKET!r}).start()
""",
    "s3": f"""
from moto.server import ThreadedMotoServer
import urllib.request
ThreadedMotoServer("127.0.0.1", port, verbose=False).start()
bucket = f"http://127.0.0.1:{{port}}/{BUCKET}"
urllib.request.urlopen(urllib.request.Request(bucket, method="PUT")).close()
""",
}
_REFUSALS = {"gs": http.HTTPStatus.UNAUTHORIZED, "s3": http.HTTPStatus.FORBIDDEN}
_SIGNED = "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, Signature=b"
_HOP_BY_HOP = ("connection", "content-length", "date", "server", "transfer-encoding")


@dataclasses.dataclass
class Service:
    """A storage service behind its proxy."""

    scheme: str  # "gs" or "s3"
    port: int  # the emulator's own
    endpoint: str = ""  # the proxy's
    # Answers to the next requests, first one first: a status, or 0 to drop the connection.
    faults: collections.deque[int] = dataclasses.field(default_factory=collections.deque)
    needs_login: bool = False  # whoever sends no `Authorization` is refused
    lists: bool = True  # else as a bucket whose files anyone may read, and no more
    one_at_a_time: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def reset(self) -> None:
        """Back to an open bucket that works."""
        self.faults.clear()
        self.needs_login, self.lists = False, True

    def url(self, path: str) -> str:
        """The URL of a path in the bucket."""
        return f"{self.scheme}://{BUCKET}/{path}"


@contextlib.contextmanager
def running(scheme: str) -> Iterator[Service]:
    """Starts the emulator and the proxy before it, on free ports."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = _PROGRAM.format(port=port, start=_STARTS[scheme])
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere) as process:
        assert process.stdout
        service = Service(scheme, port)
        try:
            assert process.stdout.readline() == b"up\n", f"the emulator of {scheme}:// is not up"
            handler = functools.partial(_Proxy, service)
            with _Server(("127.0.0.1", 0), handler) as server:
                service.endpoint = f"http://127.0.0.1:{server.server_port}"
                threading.Thread(target=server.serve_forever, daemon=True).start()
                yield service
                server.shutdown()
        finally:
            process.kill()


def upload(service: Service, folder: pathlib.Path, path: str) -> None:
    """Copies a folder into the bucket, states of optimizers excepted.

    `TENSORSTORE_GCS_HTTP_URL` must name the endpoint.
    """
    spec = {"driver": "gcs", "bucket": BUCKET}
    if service.scheme == "s3":
        login = {"type": "anonymous"}
        spec = {"driver": "s3", "bucket": BUCKET, "aws_region": "us-east-1"}
        spec |= {"endpoint": service.endpoint, "aws_credentials": login}
    store = ts.KvStore.open(spec).result()
    found = [file for file in folder.rglob("*") if file.is_file()]
    files = [file for file in found if "param_states" not in str(file)]
    names = [f"{path}/{file.relative_to(folder)}" for file in files]
    writes = [store.write(n, f.read_bytes()) for n, f in zip(names, files, strict=True)]
    for write in writes:
        write.result()


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64  # a full queue costs seconds


class _Proxy(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, service: Service, *args):
        self.service = service
        super().__init__(*args)

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.service.faults:
            fault = self.service.faults.popleft()
            if fault == 0:
                self.close_connection = True
                return
            return self._answer(fault, {}, b"")
        if self.service.needs_login and "Authorization" not in self.headers:
            return self._answer(_REFUSALS[self.service.scheme], {}, b"")
        with self.service.one_at_a_time:
            status, headers, body = self._forward(self.path, body)
            if "alt=media" in self.path and status < http.HTTPStatus.MULTIPLE_CHOICES:
                # The service names the generation, which OCDBT needs; the emulator when asked.
                described = json.loads(self._forward(self.path.partition("?")[0], b"")[2])
                headers["x-goog-generation"] = described["generation"]
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        is_list = "list-type" in query or "startOffset" in query
        if not self.service.lists and (is_list or status == http.HTTPStatus.NOT_FOUND):
            return self._answer(http.HTTPStatus.FORBIDDEN, {}, b"")
        if "startOffset" in query and status == http.HTTPStatus.OK:
            body = _within(body, query["startOffset"], query["endOffset"])
        self._answer(status, headers, body)

    do_HEAD = do_POST = do_PUT = do_GET

    def _forward(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.service.port)
        with contextlib.closing(connection):
            # The proxy alone decides who may read: moto checks no signature, but wants one.
            headers = {"Authorization": _SIGNED, **self.headers}
            connection.request(self.command, path, body, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        if status >= http.HTTPStatus.BAD_REQUEST and self.service.scheme == "gs":
            # As the service does and its emulator does not.
            headers = {"Content-Type": "application/json"}
            body = json.dumps({"error": {"code": status, "message": "said so"}}).encode()
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _within(listing: bytes, first: str, end: str) -> bytes:
    """Google's `startOffset` and `endOffset`, of which the emulator knows nothing."""
    tree = json.loads(listing)
    tree["items"] = [item for item in tree.get("items", []) if first <= item["name"] < end]
    return json.dumps(tree).encode()
