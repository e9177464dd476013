"""
A small server that speaks the Hub's HTTP protocol as huggingface_hub uses it, on loopback, with faults on demand.

Repositories are kept in memory: commits with their files, branches, pull requests, LFS objects by their sha256. As on
the Hub, a commit is all or nothing, a private repository looks like a missing one to who may not see it, and large
files come from a second host (here: another name of the same one), which never gets the token.

Importing this module starts the server and points the environment to it, so conftest.py imports it before anything
that imports huggingface_hub, which reads the environment once. No test looks at the user's cache or token, or leaves
the machine.
"""

from __future__ import annotations

import atexit
import base64
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


OWNER, READER = "hf_owner", "hf_reader"  # the tokens of two users
USERS = {OWNER: "me", READER: "reader"}
LFS_SUFFIXES = (".safetensors", ".bin", ".pt")


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """As git counts: of an LFS file, the hash of its pointer."""
        content = self.content
        if self.lfs:
            content = f"version https://git-lfs\noid sha256:{self.sha256}\nsize {len(content)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)  # sha -> path -> file
    messages: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branch or refs/pr/1 -> sha
    history: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, Blob], message: str, ref: str) -> str:
        text = json.dumps([len(self.history), message, sorted((path, blob.oid) for path, blob in files.items())])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.messages[sha], self.refs[ref] = files, message, sha
        self.history.append(sha)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content."""
        return {path: blob.content for path, blob in self.commits[self.refs.get(revision, revision)].items()}


@dataclass
class Fault:
    """What happens to the next `times` requests whose line (`"PUT /lfs/..."`) matches."""

    line: str
    times: int = 1
    skip: int = 0
    status: int | None = None
    message: str = "injected"
    drop_after: int | None = None  # bytes of the body, received or sent, after which the connection breaks
    drop_response: bool = False  # the request is carried out, and its answer is lost
    reset: bool = True  # the connection breaks with a reset, or else it just ends
    corrupt: bool = False  # a downloaded byte is another one
    before: Callable[[], None] | None = None  # runs first, say somebody else's commit


class HubServer(ThreadingHTTPServer):
    """The server; [`HubServer.start`] runs it in a thread."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage_url = f"http://localhost:{self.server_port}"
        self.lock = threading.RLock()
        self.multipart_above = 1 << 20
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        with self.lock:
            self.repositories: dict[str, Repository] = {}
            self.objects: dict[str, bytes] = {}
            self.parts: dict[tuple[str, int], bytes] = {}
            self.faults: list[Fault] = []
            self.requests: list[str] = []
            self.leaked_tokens: list[str] = []

    def start(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()
        return self

    def fail(self, line: str, **fault: Any) -> Fault:
        """Injects a fault; see [`Fault`]."""
        made = Fault(line, **fault)
        self.faults.append(made)
        return made

    def add(self, name: str, files: dict[str, bytes], private: bool = False, ref: str = "main") -> str:
        """A commit made by somebody else."""
        with self.lock:
            repository = self.repositories.setdefault(name, Repository(private))
            known = repository.commits.get(repository.refs.get(ref, repository.refs.get("main", "")), {})
            blobs = {path: Blob(content, path.endswith(LFS_SUFFIXES)) for path, content in files.items()}
            return repository.commit({**known, **blobs}, "by hand", ref)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error here."""


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, body: Any = None):
        super().__init__(message)
        self.status, self.code, self.body = status, code, body


class _Dropped(Exception):
    """The connection breaks."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body go in two packets; waiting in between takes 40 ms
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def _answer(self) -> None:
        self._unread = True
        split = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(split.query).items()}
        line = f"{self.command} {split.path}"
        with self.server.lock:
            self.server.requests.append(line)
            self.fault = self._next_fault(line)
        try:
            if self.fault.before is not None:
                self.fault.before()
            if self.fault.status is not None:
                self._body()
                raise _Refused(self.fault.status, self.fault.message)
            for method, pattern, action in _ROUTES:
                found = re.fullmatch(pattern, split.path)
                if found and self.command in method.split("|"):
                    action(self, **{name: unquote(value or "") for name, value in found.groupdict().items()})
                    return
            raise _Refused(404, f"{line} is not part of the protocol")
        except _Refused as refused:
            if self._unread:
                self._body()
            headers = {"X-Error-Message": str(refused)}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            body = refused.body if refused.body is not None else {"error": str(refused)}
            self._send(refused.status, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})
        except _Dropped:
            self._break()

    def _next_fault(self, line: str) -> Fault:
        for fault in self.server.faults:
            if fault.times > 0 and re.search(fault.line, line):
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return Fault("")

    # ---- bytes in and out ----

    def _body(self) -> bytes:
        """The request's body."""
        self._unread = False
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self._read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self._read(int(self.headers.get("Content-Length") or 0))

    def _read(self, size: int) -> bytes:
        limit = self.fault.drop_after
        if limit is not None and self.command in ("PUT", "POST"):
            self.rfile.read(min(limit, size))
            raise _Dropped
        return self.rfile.read(size)

    def _json(self) -> Any:
        return json.loads(self._body() or b"null")

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        if self._unread:
            self._body()
        if self.fault.drop_response:
            raise _Dropped
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault.drop_after is not None and self.command == "GET":
            self.wfile.write(body[: self.fault.drop_after])
            self.wfile.flush()
            raise _Dropped
        self.wfile.write(body)

    def _break(self) -> None:
        self.close_connection = True
        if self.fault.reset:  # linger of zero seconds: the other side sees a reset, as when a network goes away
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.close()

    def _send_json(self, values: Any) -> None:
        self._send(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    # ---- who may do what ----

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return USERS.get(token)

    def _repository(self, name: str) -> Repository:
        user = self._user()
        found = self.server.repositories.get(name)
        if found is None or (found.private and user != name.split("/")[0]):
            raise _Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return found

    def _writable(self, name: str) -> Repository:
        repository = self._repository(name)
        user = self._user()
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        if user != name.split("/")[0]:
            raise _Refused(403, f"you have no write access to {name}")
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        sha = repository.resolve(revision)
        if sha is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # ---- the API ----

    def create(self) -> None:
        values, user = self._json(), self._user()
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        owner = values.get("organization") or user
        name = f"{owner}/{values['name']}"
        if owner != user:
            raise _Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        if name in self.server.repositories:
            raise _Refused(
                409,
                "You already created this model repo",
                body={"url": f"{self.server.url}/{name}", "error": "exists"},
            )
        private = bool(values.get("private")) or values.get("visibility") == "private"
        repository = self.server.repositories[name] = Repository(private)
        repository.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit", "main")
        self._send_json({"url": f"{self.server.url}/{name}", "name": name})

    def validate_yaml(self) -> None:
        front = re.match(r"---\n(.*?)\n---\n", self._json()["content"], re.DOTALL)
        try:
            values = yaml.safe_load(front[1]) if front else {}
            if not isinstance(values, dict):
                raise _Refused(400, "bad metadata", body={"errors": [{"message": "metadata is not a mapping"}]})
        except yaml.YAMLError as error:
            raise _Refused(400, "bad metadata", body={"errors": [{"message": str(error)}]}) from error
        warnings = [] if front else [{"message": "empty or missing yaml metadata"}]
        self._send_json({"errors": [], "warnings": warnings})

    def info(self, name: str, revision: str = "main") -> None:
        repository = self._repository(name)
        sha = self._commit_of(repository, revision or "main")
        files = [{"rfilename": path} for path in sorted(repository.commits[sha])]
        self._send_json({"id": name, "sha": sha, "private": repository.private, "siblings": files, "tags": []})

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        repository = self._repository(name)
        files = repository.commits[self._commit_of(repository, revision)]
        entries = []
        for path, blob in sorted(files.items()):
            if path.startswith(folder):
                entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
                if blob.lfs:
                    entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}
                entries.append(entry)
        self._send_json(entries)

    def refs(self, name: str) -> None:
        repository = self._repository(name)
        names = [
            {"name": ref.split("/")[-1], "ref": ref if "/" in ref else f"refs/heads/{ref}", "targetCommit": sha}
            for ref, sha in repository.refs.items()
        ]
        prs = [item for item in names if item["ref"].startswith("refs/pr/")]
        branches = [item for item in names if item not in prs]
        self._send_json({"branches": branches, "converts": [], "tags": [], "pullRequests": prs})

    def branch(self, name: str, branch: str) -> None:
        repository, values = self._writable(name), self._json() or {}
        if branch in repository.refs:
            raise _Refused(409, f"Reference already exists: {branch}")
        repository.refs[branch] = self._commit_of(repository, values.get("startingPoint", "main"))
        self._send_json({})

    def preupload(self, name: str, revision: str) -> None:
        repository = self._repository(name) if self.query.get("create_pr") else self._writable(name)
        known = repository.commits[self._commit_of(repository, revision)]
        files = []
        for entry in self._json()["files"]:
            lfs = entry["path"].endswith(LFS_SUFFIXES)
            old = known.get(entry["path"])
            mode = "lfs" if lfs else "regular"
            files.append({"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": old and old.etag})
        self._send_json({"files": files})

    def lfs_batch(self, name: str) -> None:
        self._repository(name)
        answers = []
        for entry in self._json()["objects"]:
            oid, size = entry["oid"], entry["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.server.objects:
                upload: dict[str, Any] = {"href": f"{self.server.storage_url}/lfs/{oid}"}
                chunk = self.server.multipart_above
                if size > chunk:
                    parts = {
                        str(i + 1): f"{self.server.storage_url}/lfs/{oid}/{i + 1}" for i in range(-(-size // chunk))
                    }
                    upload = {
                        "href": f"{self.server.url}/lfs-complete/{oid}",
                        "header": {"chunk_size": str(chunk), **parts},
                    }
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.server.url}/lfs-verify/{name}"}}
            answers.append(answer)
        self._send_json({"transfer": "basic", "objects": answers})

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Refused(400, "the content's sha256 is not the object's id")
        self.server.objects[oid] = content

    def lfs_put(self, oid: str) -> None:
        self._note_leak()
        self._store(oid, self._body())
        self._send(200)

    def lfs_part(self, oid: str, part: str) -> None:
        self._note_leak()
        content = self._body()
        self.server.parts[oid, int(part)] = content
        self._send(200, headers={"ETag": hashlib.md5(content).hexdigest()})

    def lfs_complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in self._json()["parts"]]
        if any((oid, number) not in self.server.parts for number in numbers):
            raise _Refused(400, "a part is missing")
        self._store(oid, b"".join(self.server.parts[oid, number] for number in numbers))
        self._send_json({})

    def lfs_verify(self, name: str) -> None:
        self._writable(name) if self._user() == name.split("/")[0] else self._repository(name)
        values = self._json()
        if len(self.server.objects.get(values["oid"], b"")) != values["size"]:
            raise _Refused(404, "the object was not uploaded")
        self._send_json({})

    def commit(self, name: str, revision: str) -> None:
        as_pr = bool(self.query.get("create_pr"))
        repository = self._repository(name) if as_pr else self._writable(name)
        lines = [json.loads(line) for line in self._body().splitlines()]
        with self.server.lock:
            parent = self._commit_of(repository, revision)
            header = lines[0]["value"]
            if lines[0]["key"] != "header":
                raise _Refused(400, "the first line is the header")
            if not as_pr and header.get("parentCommit") not in (None, parent):
                raise _Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repository.commits[parent])
            for line in lines[1:]:
                self._apply(line["key"], line["value"], files)
            ref = revision
            if as_pr:
                ref = f"refs/pr/{1 + sum(r.startswith('refs/pr/') for r in repository.refs)}"
            sha = repository.commit(files, header["summary"], ref)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"}
        if as_pr:
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{ref.split('/')[-1]}"
        self._send_json(answer)

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, Blob]) -> None:
        path = value["path"]
        if path.startswith("/") or ".." in path.split("/"):
            raise _Refused(400, f"bad path {path!r}")
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in self.server.objects:
                raise _Refused(400, f"Your push was rejected: the LFS object {value['oid']} does not exist")
            files[path] = Blob(self.server.objects[value["oid"]], True)
        elif key == "deletedFile":
            if path not in files:
                raise _Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            del files[path]
        else:
            raise _Refused(400, f"unknown operation {key!r}")

    # ---- downloads ----

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        sha = self._commit_of(repository, revision)
        blob = repository.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if blob is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", **headers})
        elif blob.lfs:
            linked = {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
            place = f"{self.server.storage_url}/cdn/{name}/{sha}/{path}"
            self._send(302, b"", {"Location": place, **linked, **headers})
        else:
            self._send_file(blob, headers)

    def cdn(self, name: str, sha: str, path: str) -> None:
        self._note_leak()
        self._send_file(self.server.repositories[name].commits[sha][path], {})

    def _send_file(self, blob: Blob, headers: dict[str, str]) -> None:
        content, start = blob.content, 0
        if self.fault.corrupt and self.command == "GET":
            content = content[:-1] + bytes([content[-1] ^ 1])
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted:
            start = int(wanted[1])
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self._send(206 if wanted else 200, content[start:], {"ETag": f'"{blob.etag}"', **headers})

    def _note_leak(self) -> None:
        if self.headers.get("Authorization"):
            self.server.leaked_tokens.append(self.path)


_NAME = r"(?P<name>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    ("GET", rf"/api/models/{_NAME}/refs", _Handler.refs),
    ("POST", rf"/api/models/{_NAME}/branch/(?P<branch>[^/]+)", _Handler.branch),
    ("POST", rf"/api/models/{_NAME}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", _Handler.lfs_part),
    ("POST", r"/lfs-complete/(?P<oid>[0-9a-f]{64})", _Handler.lfs_complete),
    ("POST", rf"/lfs-verify/{_NAME}", _Handler.lfs_verify),
    ("GET|HEAD", rf"/cdn/{_NAME}/(?P<sha>[^/]+)/(?P<path>.+)", _Handler.cdn),
    ("GET|HEAD", rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]


def _use(server: HubServer) -> HubServer:
    home = tempfile.mkdtemp(prefix="hf_mend-tests-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ.pop("HF_TOKEN", None)
    # With hf_xet installed, files would go to Xet's own servers.
    os.environ.update(HF_ENDPOINT=server.url, HF_HOME=home, HF_HUB_DISABLE_XET="1")
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_TELEMETRY="1")
    return server


HUB = _use(HubServer().start())
