"""A loopback server that speaks the parts of the Hugging Face hub that the data chapter needs.

It lists the files of one data set, resolves them and serves ranges; it can be told to fail: `busy`
answers 503 to the next requests for file bytes, `cut` closes the connection after that many bytes,
`forge` sends other bytes than announced, `no_ranges` ignores the Range header, `endless` sends more
bytes as long as somebody takes them.
"""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """State of the server: files {path: bytes}, faults to play, and a log of what was asked."""

    daemon_threads = True

    def __init__(self, name, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.files, self.commit = name, files, COMMIT
        self.busy, self.cut, self.forge, self.no_ranges = 0, [], False, False
        self.list_busy, self.endless, self.sent = 0, False, 0
        self.meet = None  # a threading.Barrier at which requests for file bytes wait for each other
        self.plain = set()  # files kept in git itself, without LFS
        self.asked = []  # (path, Range header or None) of each request for file bytes
        self.tokens = []  # Authorization headers

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def entry(self, path):
        data = self.files[path]
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"type": "file", "oid": git, "size": len(data), "path": path}
        if path not in self.plain:
            oid = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
        return entry


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def reply_json(self, value, status=200):
        self.reply(status, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self):
        server, path = self.server, unquote(urlsplit(self.path).path)
        api = re.fullmatch(rf"/api/datasets/{server.name}/(revision|tree)/([^/]+)/?", path)
        info = path == f"/api/datasets/{server.name}"
        resolve = re.fullmatch(rf"/datasets/{server.name}/resolve/([^/]+)/(.+)", path)
        revision = "main" if info else api[2] if api else resolve[1] if resolve else ""
        if revision not in ("main", server.commit):
            self.reply_json({"error": "not found"}, 404)
        elif resolve:
            self.send_file(resolve[2])
        elif server.list_busy > 0:
            server.list_busy -= 1
            self.reply_json({"error": "busy"}, 503)
        elif info or api[1] == "revision":
            siblings = [{"rfilename": name} for name in server.files]
            facts = {"id": server.name, "sha": server.commit, "private": False, "gated": False}
            self.reply_json({**facts, "tags": [], "disabled": False, "siblings": siblings})
        else:
            self.reply_json([server.entry(name) for name in server.files])

    def send_file(self, name):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append((name, wanted))
        server.tokens.append(self.headers.get("Authorization"))
        if server.meet:
            server.meet.wait(timeout=20)
        if server.busy > 0:
            server.busy -= 1
            return self.reply(503, b"busy")
        if name not in server.files:
            return self.reply(404, b"no such file")
        data = server.files[name]
        if server.forge:
            data = bytes([data[0] ^ 1]) + data[1:]
        start = 0
        if wanted and not server.no_ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        body = data[start:]
        if server.endless:
            return self.send_on(body)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cut:
            body = body[: server.cut.pop(0)]
            self.close_connection = True
        self.wfile.write(body)

    def send_on(self, body):
        """Send the body again and again, to no announced end; 40 MB are enough for a test."""
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(ConnectionError):
            for _ in range(40_000_000 // len(body)):
                self.wfile.write(body)
                self.server.sent += len(body)


@contextlib.contextmanager
def hub_server(name, files):
    """Serve a data set on a free loopback port; yields the HubServer."""
    server = HubServer(name, files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
