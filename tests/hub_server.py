"""A stand-in for Hugging Face's hub on this machine: models as files in memory, in the parts of its interface that are used."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(BaseHTTPRequestHandler):
    models, asked = {}, []

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, whole):
        self.asked.append((self.command, self.path, self.headers.get("Authorization")))
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/\w+/(.+)", self.path):
            file = self.models.get(found[1], {}).get(found[2])
            if file is None:
                code = "EntryNotFound" if found[1] in self.models else "RepoNotFound"
                return self.send(404, b"", {"X-Error-Code": code})
            name = {"ETag": f'"{hashlib.sha1(file).hexdigest()}"', "X-Repo-Commit": "1" * 40}
            return self.send(200, file, name, whole)
        if found := re.match(r"/api/models/([\w.-]+/[\w.-]+)/?(\w*)", self.path):
            if found[1] not in self.models:
                return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
            if found[2] == "tree":
                files = [dict(type="file", path=name, size=len(x), oid="1" * 40) for name, x in self.models[found[1]].items()]
                return self.send(200, json.dumps(files).encode())
            files = [dict(rfilename=name) for name in self.models[found[1]]]
            about = dict(id=found[1], sha="1" * 40, siblings=files, tags=[], private=False, downloads=0, likes=0)
            return self.send(200, json.dumps(about).encode())
        return self.send(404, b"")

    def do_POST(self):
        self.asked.append((self.command, self.path, self.headers.get("Authorization")))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told.get('organization') or 'me'}/{told['name']}"
            self.models.setdefault(name, {})
            return self.send(200, json.dumps(dict(url=f"http://{self.headers['Host']}/{name}")).encode())
        if self.path == "/api/validate-yaml":
            return self.send(200, b'{"errors": [], "warnings": []}')
        name = re.match(r"/api/models/([\w.-]+/[\w.-]+)/", self.path)[1]
        if "/preupload/" in self.path:
            files = [dict(path=file["path"], uploadMode="regular", shouldIgnore=False) for file in json.loads(body)["files"]]
            return self.send(200, json.dumps(dict(files=files)).encode())
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.models[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        done = dict(commitUrl=f"http://{self.headers['Host']}/{name}/commit/{'1' * 40}", commitOid="1" * 40, success=True)
        return self.send(200, json.dumps(done).encode())

    def send(self, status, body, headers=None, whole=True):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body)), "Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if whole:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def serve():
    """Starts a hub of its own, and returns the server, with the address as `url` and its class of requests as `hub`."""
    hub = type("Hub", (Hub,), dict(models={}, asked=[]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub)
    server.hub, server.url = hub, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
