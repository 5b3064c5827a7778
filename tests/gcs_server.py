"""A bucket on this machine: as much of Google Cloud Storage's JSON API as gcsfs, TensorStore and our lock ask for.

Started as `with serve() as (objects, variables):`; the variables tell clients where it is. Objects live in memory;
every write makes a new generation, and preconditions on generations are honoured, as in
https://cloud.google.com/storage/docs/json_api/v1 and .../docs/request-preconditions.
"""

import base64
import contextlib
import email.parser
import email.policy
import hashlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any, NamedTuple

import google_crc32c

BUCKET = "bucket"


class Stored(NamedTuple):
    """One object: its bytes, and the number of the write that made it."""

    content: bytes
    generation: int


class Objects:
    """What a bucket holds; `failures` requests that write are answered with 503 first."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.by_name: dict[str, Stored] = {}
        self.sessions: dict[str, tuple[str, dict[str, str], bytearray]] = {}
        self.numbers = itertools.count(1)
        self.failures = 0

    def write(self, name: str, content: bytes, query: dict[str, str]) -> Stored | None:
        """Returns the new object, None where a precondition does not hold."""
        with self.lock:
            wanted = query.get("ifGenerationMatch")
            there = self.by_name.get(name)
            if wanted is not None and int(wanted) != (there.generation if there else 0):
                return None
            self.by_name[name] = Stored(bytes(content), next(self.numbers))
            return self.by_name[name]

    def about(self, name: str, stored: Stored) -> dict[str, Any]:
        """An object's metadata."""
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": BUCKET,
            "id": f"{BUCKET}/{name}/{stored.generation}",
            "generation": str(stored.generation),
            "metageneration": "1",
            "size": str(len(stored.content)),
            "md5Hash": base64.b64encode(hashlib.md5(stored.content).digest()).decode(),
            "crc32c": base64.b64encode(google_crc32c.Checksum(stored.content).digest()).decode(),
            "etag": str(stored.generation),
            "contentType": "application/octet-stream",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
            "storageClass": "STANDARD",
        }


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers requests of one bucket."""

    protocol_version = "HTTP/1.1"
    objects: Objects

    def log_message(self, *words: object) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError):  # a client that has heard enough
                self.wfile.write(body)

    def tell(self, value: Any, code: int = 200) -> None:
        self.answer(code, json.dumps(value).encode())

    def refuse(self, code: int) -> None:
        self.tell({"error": {"code": code, "message": self.responses[code][0], "errors": []}}, code)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def parts(self) -> tuple[str, dict[str, str]]:
        url = urllib.parse.urlsplit(self.path)
        return url.path, dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))

    def do_GET(self) -> None:
        path, query = self.parts()
        if re.fullmatch(r"/storage/v1/b/[^/]+", path):
            self.tell({"kind": "storage#bucket", "name": BUCKET, "id": BUCKET, "location": "HERE"})
        elif re.fullmatch(r"/storage/v1/b/[^/]+/o", path):
            self.list(query)
        elif found := re.fullmatch(r"(?:/download)?/storage/v1/b/[^/]+/o/(.+)", path):
            self.read(urllib.parse.unquote(found[1]), query, media=query.get("alt") == "media")
        elif found := re.fullmatch(r"/[^/]+/(.+)", path):
            self.read(urllib.parse.unquote(found[1]), query, media=True)
        else:
            self.refuse(404)

    do_HEAD = do_GET

    def list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        first, last = query.get("startOffset", ""), query.get("endOffset")
        items, prefixes = [], {}
        with self.objects.lock:
            for name, stored in sorted(self.objects.by_name.items()):
                if not name.startswith(prefix) or name < first or (last is not None and name >= last):
                    continue
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    prefixes[prefix + rest.split(delimiter)[0] + delimiter] = None
                else:
                    items.append(self.objects.about(name, stored))
        self.tell({"kind": "storage#objects", "items": items, "prefixes": list(prefixes)})

    def read(self, name: str, query: dict[str, str], *, media: bool) -> None:
        stored = self.objects.by_name.get(name)
        if stored is None:
            return self.refuse(404)
        if query.get("ifGenerationNotMatch") == str(stored.generation):
            return self.answer(304)
        if query.get("ifGenerationMatch", str(stored.generation)) != str(stored.generation):
            return self.refuse(412)
        if not media:
            return self.tell(self.objects.about(name, stored))
        content, code, more = stored.content, 200, {}
        if found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            size = len(content)
            start = int(found[1]) if found[1] else size - int(found[2])
            stop = min(size, int(found[2]) + 1) if found[1] and found[2] else size
            if start >= size and size:
                return self.refuse(416)
            content, code = content[start:stop], 206
            more = {"Content_Range": f"bytes {start}-{stop - 1}/{size}"}
        about = self.objects.about(name, stored)
        hashes = {"X_Goog_Hash": f"crc32c={about['crc32c']},md5={about['md5Hash']}"}
        generation = {"X_Goog_Generation": str(stored.generation), "X_Goog_Metageneration": "1"}
        return self.answer(code, content, "application/octet-stream", **more, **hashes, **generation)

    def do_POST(self) -> None:
        path, query = self.parts()
        body = self.body()
        if self.objects.failures > 0 and path.startswith("/upload/"):
            self.objects.failures -= 1
            self.refuse(503)
        elif "upload_id" in query:
            self.resume(query["upload_id"], body)
        elif path.startswith("/upload/storage/v1/b/"):
            self.upload(query, body)
        elif path.startswith("/batch/"):
            self.batch(body)
        elif found := re.fullmatch(r"/storage/v1/b/[^/]+/o/([^/]+)/(?:rewriteTo|copyTo)/b/[^/]+/o/([^/]+)", path):
            self.copy(*map(urllib.parse.unquote, found.groups()), query)
        elif found := re.fullmatch(r"/storage/v1/b/[^/]+/o/([^/]+)/moveTo/o/([^/]+)", path):
            source, target = map(urllib.parse.unquote, found.groups())
            with self.objects.lock:
                moved = self.objects.by_name.pop(source, None)
                self.refuse(404) if moved is None else self.written(target, moved.content, query)
        elif found := re.fullmatch(r"/storage/v1/b/[^/]+/o/([^/]+)/compose", path):
            names = [one["name"] for one in json.loads(body)["sourceObjects"]]
            joined = b"".join(self.objects.by_name[name].content for name in names)
            self.written(urllib.parse.unquote(found[1]), joined, query)
        else:
            self.refuse(404)

    def upload(self, query: dict[str, str], body: bytes) -> None:
        kind = query["uploadType"]
        if kind == "media":
            self.written(query["name"], body, query)
        elif kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            first, _ = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body).iter_parts()
            self.written(json.loads(first.get_payload(decode=True))["name"], self.raw_part(body), query)
        else:
            name = query.get("name") or json.loads(body)["name"]
            session = str(next(self.objects.numbers))
            self.objects.sessions[session] = (name, query, bytearray())
            here = f"http://{self.headers['Host']}/upload/resumable?upload_id={session}"
            self.answer(200, Location=here)

    def raw_part(self, body: bytes) -> bytes:
        """The second part's bytes as they are: mail parsers mend line ends."""
        boundary = re.search(r'boundary="?([^";]+)"?', self.headers["Content-Type"])
        assert boundary is not None
        part = body.split(b"--" + boundary[1].encode())[2]
        return part.split(b"\r\n\r\n" if b"\r\n\r\n" in part else b"\n\n", 1)[1].removesuffix(b"\n").removesuffix(b"\r")

    def do_PUT(self) -> None:
        self.resume(self.parts()[1]["upload_id"], self.body())

    def resume(self, session: str, body: bytes) -> None:
        name, asked, held = self.objects.sessions[session]
        found = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range", ""))
        held += body
        if found is None or (found[3] != "*" and len(held) >= int(found[3])):
            self.written(name, bytes(held), asked)
        else:
            more = {"Range": f"bytes=0-{len(held) - 1}"} if held else {}
            self.answer(308, **more)

    def written(self, name: str, content: bytes, query: dict[str, str]) -> None:
        stored = self.objects.write(name, content, query)
        self.refuse(412) if stored is None else self.tell(self.objects.about(name, stored))

    def copy(self, source: str, target: str, query: dict[str, str]) -> None:
        stored = self.objects.by_name.get(source)
        if stored is None:
            return self.refuse(404)
        copied = self.objects.write(target, stored.content, query)
        if copied is None:
            return self.refuse(412)
        size = str(len(copied.content))
        about = self.objects.about(target, copied)
        return self.tell({"done": True, "objectSize": size, "totalBytesRewritten": size, "resource": about})

    def batch(self, body: bytes) -> None:
        """Several deletions in one request, answered one by one."""
        lines = re.findall(rb"DELETE (\S+) HTTP", body)
        out = []
        for number, line in enumerate(lines):
            name = urllib.parse.unquote(urllib.parse.urlsplit(line.decode()).path.rpartition("/o/")[2])
            code = 204 if self.objects.by_name.pop(name, None) else 404
            out.append(
                f"--sent\r\nContent-Type: application/http\r\nContent-ID: <response-{number + 1}>\r\n\r\n"
                f"HTTP/1.1 {code} X\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        self.answer(200, ("".join(out) + "--sent--").encode(), "multipart/mixed; boundary=sent")

    def do_DELETE(self) -> None:
        path, query = self.parts()
        name = urllib.parse.unquote(path.rpartition("/o/")[2])
        with self.objects.lock:
            stored = self.objects.by_name.get(name)
            if stored is None:
                return self.refuse(404)
            if query.get("ifGenerationMatch", str(stored.generation)) != str(stored.generation):
                return self.refuse(412)
            del self.objects.by_name[name]
        return self.answer(204)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True


@contextlib.contextmanager
def serve() -> Iterator[tuple[Objects, dict[str, str]]]:
    """Serves an empty bucket; gives what it holds, and the environment that clients of it need."""
    objects = Objects()
    with Server(("127.0.0.1", 0), type("Bound", (Handler,), {"objects": objects})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        yield objects, {"STORAGE_EMULATOR_HOST": here, "TENSORSTORE_GCS_HTTP_URL": here}
        server.shutdown()
