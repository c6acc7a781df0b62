"""The Hub's HTTP API on 127.0.0.1, as much of it as pushing and reading a model takes; with faults on demand.

Repositories are kept in memory, as commits of whole trees. Text goes inline in a commit, all else by LFS, in several
parts where a file is larger than `part` bytes. Nothing of it speaks xet: a client is to run with HF_HUB_DISABLE_XET=1.

    with HubServer() as hub:
        hub.fail("PUT", "/lfs/", cut=1000)          # the next upload is cut after 1000 bytes
        subprocess.run([...], env={**os.environ, **hub.environment(folder)})
        assert hub.files("user/name") == {...}
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_" + "T" * 34
READER = "hf_" + "R" * 34
USER = "user"
TEXT = (".json", ".md", ".yaml", ".txt", ".jinja", ".gitattributes")
WAIT = 30.0


@dataclass
class Fault:
    """What happens to requests of a method whose path holds `path`, `times` times, after `skip` of them.

    status: answered instead; cut: the connection is reset after so many bytes of the request's body, or ends after so
    many of the answer's; deaf: what was asked is done, and the connection reset instead of an answer.
    """

    method: str
    path: str
    status: int = 0
    cut: int | None = None
    deaf: bool = False
    times: int = 1
    skip: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Repo:
    """branches: name -> commits, oldest first; a commit is its id and path -> content."""

    private: bool = False
    gated: bool = False
    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c[0] == revision), None)


@dataclass(frozen=True)
class Request:
    """What was asked: received is how many bytes of a body came."""

    method: str
    path: str
    status: int
    received: int
    sent: int
    authorized: bool
    range: str | None


class HubServer:
    """Use as a context manager. Two tokens are known: TOKEN writes as USER, READER only reads."""

    def __init__(self, *, part: int = 1 << 20) -> None:
        self.part = part
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.lock = threading.RLock()
        hub = self

        class Bound(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Large files lie on another host, to which a client must not send its token.
        self.store = f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, *, token: str | None = TOKEN) -> dict[str, str]:
        """What a client's environment has to say to come here and nowhere else."""
        found = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "HF_TOKEN": token or "",
        }
        return found

    def fail(self, method: str, path: str, **what: Any) -> None:
        self.faults.append(Fault(method, path, **what))

    def publish(self, name: str, folder: Path, *, branch: str = "main", **of_repo: Any) -> str:
        """Put a folder's files up as a commit; returns its id."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        repo = self.repos.setdefault(name, Repo(**of_repo))
        return self.commit(repo, branch, files)

    def commit(self, repo: Repo, branch: str, files: dict[str, bytes]) -> str:
        commits = repo.branches.setdefault(branch, [])
        text = repr((branch, len(commits), sorted((p, hashlib.sha256(d).hexdigest()) for p, d in files.items())))
        oid = hashlib.sha1(text.encode()).hexdigest()
        commits.append((oid, files))
        return oid

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """What a repository holds; nothing where there is none."""
        found = self.repos.get(name, Repo()).at(branch)
        return found[1] if found else {}

    def asked(self, method: str, path: str) -> list[Request]:
        return [one for one in self.log if one.method == method and path in one.path]


def use(hub: HubServer, patch: pytest.MonkeyPatch, home: Path, *, token: str | None = TOKEN) -> None:
    """Let this process's client of the Hub, which reads its environment when it's imported, come here."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    for key, value in hub.environment(home, token=token).items():
        patch.setenv(key, value)
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    disable_progress_bars()


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = WAIT

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET

    # What every request goes through.

    def _answer(self) -> None:
        hub, self.sent, self.status, self.received = self.server_hub, 0, 0, 0
        fault = self._fault()
        try:
            body = self._body(fault)
            if fault is not None and fault.status:
                self._send(fault.status, dict(fault.body), dict(fault.headers))
                return
            self.fault = fault
            with hub.lock:
                self._route(body)
        except _Cut:
            self._reset()
        finally:
            url = urlsplit(self.path)
            hub.log.append(
                Request(
                    self.command, url.path, self.status, self.received, self.sent, self._user() is not None,
                    self.headers.get("Range"),
                )
            )  # fmt: skip

    def _fault(self) -> Fault | None:
        with self.server_hub.lock:
            for fault in self.server_hub.faults:
                if fault.method == self.command and fault.path in self.path and fault.times:
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def _body(self, fault: Fault | None) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.received = len(data)
                self.rfile.readline()
                if fault is not None and fault.cut is not None and self.command != "GET" and len(data) >= fault.cut:
                    raise _Cut
            self.rfile.readline()
            return data
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.cut is not None and self.command != "GET":
            self.received = len(self.rfile.read(min(fault.cut, length)))
            raise _Cut
        data = self.rfile.read(length)
        self.received = len(data)
        return data

    def _reset(self) -> None:
        """The peer sees the connection break, not end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _send(self, status: int, value: Any = None, headers: Mapping[str, str] | None = None) -> None:
        data = b"" if value is None else value if isinstance(value, bytes) else json.dumps(value).encode()
        fault = getattr(self, "fault", None)
        if fault is not None and fault.deaf:
            raise _Cut
        self.status = status
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        for key, text in given.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.cut is not None:
            self.wfile.write(data[: fault.cut])
            self.wfile.flush()
            self.sent = min(fault.cut, len(data))
            self.close_connection = True
            return
        self.wfile.write(data)
        self.sent = len(data)

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        self._send(status, {"error": message or code}, {"X-Error-Code": code, "X-Error-Message": message or code})

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return {TOKEN: USER, READER: "reader"}.get(token)

    def _route(self, body: bytes) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        path = unquote(url.path)
        for method, pattern, name in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split("|"):
                getattr(self, name)(body, *found.groups())
                return
        self._refuse(404, "NotFound", f"no such address: {self.command} {path}")

    def _repo(self, name: str, revision: str = "main", *, write: bool = False) -> tuple[Repo, Any] | None:
        """The repository and its commit, when whoever asks may see it; otherwise it has been refused."""
        repo, user = self.server_hub.repos.get(name), self._user()
        if repo is None or (repo.private and user is None):
            self._refuse(401 if user is None else 404, "RepoNotFound", "Repository not found")
        elif write and user != name.partition("/")[0]:
            self._refuse(403, "Forbidden", "you don't have the rights to write here")
        elif repo.at(revision) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repo, repo.at(revision)
        return None

    # The addresses.

    def whoami(self, body: bytes) -> None:
        user = self._user()
        if user is None:
            self._refuse(401, "Unauthorized", "Invalid credentials in Authorization header")
        else:
            self._send(200, {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, body: bytes) -> None:
        asked, user, hub = json.loads(body), self._user(), self.server_hub
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if user is None:
            self._refuse(401, "Unauthorized", "Invalid username or password.")
        elif owner != user:
            self._refuse(
                403, "Forbidden", f'You don\'t have the rights to create a model under the namespace "{owner}"'
            )
        elif name in hub.repos:
            self._refuse(409, "RepoExists", "You already created this model repo")
        else:
            repo = hub.repos[name] = Repo(private=asked.get("visibility") == "private")
            hub.commit(repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})
            self._send(200, {"url": f"{hub.url}/{name}", "id": name})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        found = self._repo(name, json.loads(body or b"{}").get("startingPoint", "main"), write=True)
        if found is None:
            return
        repo, commit = found
        if branch in repo.branches:
            self._refuse(409, "Conflict", f"Reference already exists: {branch}")
        else:
            repo.branches[branch] = [commit]
            self._send(200, {})

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        found = self._repo(name, revision or "main")
        if found is None:
            return
        repo, (oid, files) = found
        siblings, gated = [{"rfilename": path} for path in files], "manual" if repo.gated else False
        self._send(
            200,
            {"id": name, "sha": oid, "private": repo.private, "gated": gated, "siblings": siblings, "tags": []},
        )

    def tree(self, body: bytes, name: str, revision: str) -> None:
        found = self._repo(name, revision)
        if found is not None:
            self._send(200, [_entry(path, data) for path, data in found[1][1].items()])

    def paths_info(self, body: bytes, name: str, revision: str) -> None:
        found = self._repo(name, revision)
        if found is None:
            return
        form = "json" in self.headers.get("Content-Type", "")
        wanted = json.loads(body)["paths"] if form else parse_qs(body.decode()).get("paths", [])
        self._send(200, [_entry(path, data) for path, data in found[1][1].items() if path in wanted])

    def validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        if content.startswith("---\n"):
            self._send(200, {"errors": [], "warnings": []})
        else:
            self._send(400, {"errors": [{"message": "no metadata"}], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        found = self._repo(name, revision, write=True)
        if found is None:
            return
        there = found[1][1]
        self._send(
            200,
            {"files": [
                {"path": one["path"], "uploadMode": "regular" if one["path"].endswith(TEXT) else "lfs",
                 "shouldIgnore": False, "oid": _oid(one["path"], there[one["path"]]) if one["path"] in there else None}
                for one in json.loads(body)["files"]
            ]},
        )  # fmt: skip

    def batch(self, body: bytes, name: str) -> None:
        if self._repo(name, write=True) is None:
            return
        hub, objects = self.server_hub, []
        for one in json.loads(body)["objects"]:
            oid, size = one["oid"], one["size"]
            if oid in hub.blobs:
                objects.append({"oid": oid, "size": size})
                continue
            verify = {"href": f"{hub.url}/lfs/{oid}/verify"}
            if size <= hub.part:
                upload: dict[str, Any] = {"href": f"{hub.url}/lfs/{oid}/put"}
            else:
                count = -(-size // hub.part)
                urls = {f"{n + 1:05}": f"{hub.url}/lfs/{oid}/part/{n + 1}" for n in range(count)}
                upload = {"href": f"{hub.url}/lfs/{oid}/complete", "header": {"chunk_size": str(hub.part), **urls}}
            objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        self._send(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        self._keep(oid, body)

    def put_part(self, body: bytes, oid: str, number: str) -> None:
        self.server_hub.parts[oid, int(number)] = body
        self._send(200, None, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def complete(self, body: bytes, oid: str) -> None:
        parts = self.server_hub.parts
        self._keep(oid, b"".join(parts[oid, one["partNumber"]] for one in json.loads(body)["parts"]))

    def _keep(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            self._refuse(400, "BadRequest", "the content's sha256 differs")
        else:
            self.server_hub.blobs[oid] = data
            self._send(200, {})

    def verify(self, body: bytes, oid: str) -> None:
        whole = len(self.server_hub.blobs.get(oid, b"")) == json.loads(body)["size"]
        self._send(200, {}) if whole else self._refuse(404, "NotFound", "no such object")

    def commit(self, body: bytes, name: str, revision: str) -> None:
        found, hub = self._repo(name, revision, write=True), self.server_hub
        if found is None:
            return
        repo, (head, files) = found
        lines = [json.loads(line) for line in body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != head:
            self._refuse(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
            return
        new = dict(files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in hub.blobs:
                    self._refuse(400, "BadRequest", f"LFS pointer to an object that isn't there: {value['path']}")
                    return
                new[value["path"]] = hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del new[value["path"]]
        oid = hub.commit(repo, revision, new)
        self._send(200, {"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        found = self._repo(name, revision)
        if found is None:
            return
        repo, (oid, files) = found
        if repo.gated and self._user() != name.partition("/")[0]:
            self._refuse(401 if self._user() is None else 403, "GatedRepo", f"Access to model {name} is restricted")
        elif path not in files:
            self._refuse(404, "EntryNotFound", f"no such file: {path}")
        else:
            data = files[path]
            common = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
            if path.endswith(TEXT):
                self._content(data, {**common, "ETag": f'"{_oid(path, data)}"'})
                return
            sha = hashlib.sha256(data).hexdigest()
            self.server_hub.blobs.setdefault(sha, data)
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{sha}"'}
            self._send(
                302, None, {**common, **linked, "ETag": '"pointer"', "Location": f"{self.server_hub.store}/cdn/{sha}"}
            )

    def cdn(self, body: bytes, sha: str) -> None:
        self._content(self.server_hub.blobs[sha], {"ETag": f'"{sha}"', "Accept-Ranges": "bytes"})

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        headers["Content-Type"] = "application/octet-stream"
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if self.command == "HEAD":
            self._send(200, None, {**headers, "Content-Length": str(len(data))})
        elif asked is None:
            self._send(200, data, headers)
        else:
            first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self._send(206, data[first : last + 1], headers)


class _Cut(Exception):
    """The connection breaks here."""


def _oid(path: str, data: bytes) -> str:
    """As the Hub has it: a file's git hash, or the sha256 of what goes by LFS."""
    if path.endswith(TEXT):
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return hashlib.sha256(data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _oid(path, data)}
    if not path.endswith(TEXT):
        found["lfs"] = {"oid": found["oid"], "size": len(data), "pointerSize": 130}
    return found


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", rf"/api/models/{_NAME}", "info"),
    ("GET", rf"/api/models/{_NAME}/revision/(.+)", "info"),
    ("GET", rf"/api/models/{_NAME}/tree/(.+)", "tree"),
    ("POST", rf"/api/models/{_NAME}/paths-info/(.+)", "paths_info"),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", "branch"),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", "preupload"),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", "commit"),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(\w+)/put", "put"),
    ("PUT", r"/lfs/(\w+)/part/(\d+)", "put_part"),
    ("POST", r"/lfs/(\w+)/complete", "complete"),
    ("POST", r"/lfs/(\w+)/verify", "verify"),
    ("GET|HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", "resolve"),
    ("GET|HEAD", r"/cdn/(\w+)", "cdn"),
)
