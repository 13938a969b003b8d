"""A small Hugging Face Hub on this machine, with faults on demand.

It speaks the part of the Hub's HTTP API that ``huggingface_hub`` calls to
create a repository, upload to it and download from it, over real sockets, so
the client that users have runs unchanged with ``HF_ENDPOINT`` pointing here:

    with HubServer() as hub:
        hub.add_repo("someone/model", {"config.json": b"{}"})
        run(..., env={"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token})

Large files follow the LFS protocol (batch, single and multipart PUT, verify)
and are served, as on the Hub, by a redirect to another host: ``localhost``
instead of ``127.0.0.1``, so a client that leaks its token there is caught
(``hub.leaks``). Xet is not spoken: clients need ``HF_HUB_DISABLE_XET=1``.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.metadata
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LFS_SUFFIXES = (".safetensors", ".npz", ".pt", ".bin")
REGULAR_LIMIT = 10 * 1024 * 1024
CLIENT = int(importlib.metadata.version("huggingface_hub").partition(".")[0])
needs_client_1 = pytest.mark.skipif(
    CLIENT < 1, reason="an earlier client cannot be told: pip install 'huggingface_hub>=1'"
)


@dataclass(frozen=True)
class Blob:
    """One file of a commit: where it is stored, and what its names are."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
            f"size {len(self.content)}\n"
        ).encode()

    @property
    def git_oid(self) -> str:
        data = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Repo:
    """Commits by id, and the branches that point at them."""

    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        identity = f"{len(self.commits)} {branch} {sorted((p, b.etag) for p, b in files.items())}"
        oid = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        if revision in self.branches:
            return self.branches[revision]
        return revision if revision in self.commits else None

    @property
    def files(self) -> dict[str, Blob]:
        """What stands at the head of main."""
        return self.commits[self.branches["main"]]


@dataclass
class Fault:
    """What goes wrong on the next ``times`` requests whose "METHOD path" matches.

    ``status`` answers with that code; ``drop_request`` reads that many bytes of
    the body and hangs up; ``drop_response`` sends that many bytes of the answer's
    body and hangs up; ``shorten`` sends a complete answer without its last bytes;
    ``alter`` changes the body that is sent; ``headers`` replaces headers of the answer;
    ``silence`` says nothing for that many seconds and hangs up; ``endless`` never stops
    sending zeros; ``no_ranges`` sends a file from its begin, whatever part was asked for;
    ``trickle`` sends a byte, waits for that many seconds, and so on.
    """

    match: str
    times: int = 1
    status: int | None = None
    message: str = "made to fail"
    drop_request: int | None = None
    drop_response: int | None = None
    shorten: int | None = None
    alter: Callable[[bytes], bytes] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    silence: float | None = None
    endless: bool = False
    no_ranges: bool = False
    trickle: float | None = None


@dataclass(frozen=True)
class Request:
    """One request, as the tests read it back."""

    method: str
    path: str
    status: int
    range: str | None
    authorized: bool
    sent: int


class HubServer:
    """The server and its state; a context manager."""

    token = "hf_only_for_this_test"
    read_token = "hf_only_for_reading"

    def __init__(self, *, part_size: int | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.leaks: list[str] = []
        #: LFS objects larger than this go up in parts of this size
        self.part_size = part_size
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.storage_url = f"http://localhost:{self.port}"
        self._thread = threading.Thread(
            target=lambda: self._server.serve_forever(poll_interval=0.02), daemon=True
        )

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: Any, *, token: str | None = "write", **more: str) -> dict[str, str]:
        """The variables that point a client here; ``home`` keeps its cache and token file."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "HF_HUB_ETAG_TIMEOUT": "5",
            **more,
        }
        if token is not None:
            known = {"write": self.token, "read": self.read_token}
            variables["HF_TOKEN"] = known.get(token, token)
        return variables

    def add_repo(self, repo_id: str, files: dict[str, bytes], *, private: bool = False) -> str:
        """A repository with one commit on main; returns the commit."""
        repo = self.repos.setdefault(repo_id, Repo(private))
        blobs = {".gitattributes": Blob(GITATTRIBUTES, lfs=False)}
        for path, content in files.items():
            blobs[path] = Blob(content, lfs=self.is_lfs(path, len(content), content[:512]))
        return repo.commit("main", blobs)

    @staticmethod
    def is_lfs(path: str, size: int, sample: bytes) -> bool:
        return path.endswith(LFS_SUFFIXES) or size > REGULAR_LIMIT or b"\0" in sample

    def fail(self, match: str, **what: Any) -> Fault:
        """Arm a fault; see :class:`Fault`."""
        fault = Fault(match, **what)
        self.faults.append(fault)
        return fault

    def asked(self, match: str) -> list[Request]:
        """The requests so far whose "METHOD path" matches."""
        return [r for r in self.requests if re.search(match, f"{r.method} {r.path}")]


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


class _HungUp(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    # an answer is written in two pieces: held back, the second would come 40 ms later
    disable_nagle_algorithm = True
    protocol_version = "HTTP/1.1"
    server_version = "LocalHub"

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[no-any-return]

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    # one request ---------------------------------------------------------

    def _serve(self) -> None:
        split = urlsplit(self.path)
        self.route, self.query = unquote(split.path), parse_qs(split.query)
        self.fault = self._armed(f"{self.command} {self.route}")
        self.sent = 0
        status = 0
        try:
            if self.fault and self.fault.silence is not None:
                time.sleep(self.fault.silence)
                raise _HungUp
            if self.fault and self.fault.endless:
                self._send_without_end()
            if self.fault and self.fault.drop_request is not None:
                self.rfile.read(self.fault.drop_request)
                raise _HungUp
            self.body = self._read_body()
            host = self.headers.get("Host", "")
            if host.startswith("localhost") and self._token():
                self.hub.leaks.append(f"{self.command} {self.route}")
            if self.fault and self.fault.status is not None:
                raise _Refused(self.fault.status, self.fault.message)
            with self.hub.lock:
                status = self._dispatch()
        except _Refused as refusal:
            status = refusal.status
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._answer(status, {"error": refusal.message}, headers)
        except _HungUp:
            self.close_connection = True
            self.connection.close()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.hub.requests.append(
                Request(
                    self.command,
                    self.route,
                    status,
                    self.headers.get("Range"),
                    self._token() is not None,
                    self.sent,
                )
            )

    def _send_without_end(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        piece = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        while True:
            self.wfile.write(piece)
            self.sent += 0x10000

    def _armed(self, line: str) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times > 0 and re.search(fault.match, line):
                    fault.times -= 1
                    return fault
        return None

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(
        self, status: int, content: Any = b"", headers: dict[str, str] | None = None
    ) -> int:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        promised = len(content)
        fault = self.fault
        if fault and status < 300 and self.command == "GET":
            if fault.alter:
                content = fault.alter(content)
                promised = len(content)
            if fault.shorten is not None:
                content = content[: -fault.shorten]
                promised = len(content)
        if fault:
            headers = {**(headers or {}), **fault.headers}
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(promised))
        self.end_headers()
        if self.command == "HEAD":
            return status
        if fault and fault.drop_response is not None and self.command == "GET" and status < 300:
            self.wfile.write(content[: fault.drop_response])
            self.wfile.flush()
            self.sent = min(fault.drop_response, len(content))
            time.sleep(0.05)  # let it arrive before the connection goes
            raise _HungUp
        if fault and fault.trickle is not None:
            with contextlib.suppress(OSError):
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    time.sleep(fault.trickle)
            raise _HungUp
        self.wfile.write(content)
        self.sent = len(content)
        return status

    # who may -------------------------------------------------------------

    def _token(self) -> str | None:
        header = self.headers.get("Authorization") or ""
        return header[len("Bearer ") :] if header.startswith("Bearer ") else None

    def _user(self) -> str | None:
        token = self._token()
        if token is None:
            return None
        if token not in (self.hub.token, self.hub.read_token):
            raise _Refused(401, "Invalid credentials in Authorization header")
        return "someone"

    def _writer(self, repo_id: str) -> None:
        if self._user() is None:
            raise _Refused(401, "Invalid username or password.")
        if self._token() != self.hub.token or repo_id.split("/")[0] != "someone":
            raise _Refused(
                403,
                "Forbidden: you don't have the rights to write under the namespace "
                f'"{repo_id.split("/")[0]}"',
            )

    def _repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        user = self._user()
        if repo is None or (repo.private and user is None):
            raise _Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def _revision(self, repo_id: str, revision: str) -> tuple[Repo, str]:
        repo = self._repo(repo_id)
        oid = repo.resolve(revision)
        if oid is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, oid

    # what is asked -------------------------------------------------------

    def _dispatch(self) -> int:
        for methods, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and self.command in methods:
                return int(getattr(self, name)(**match.groupdict()))
        raise _Refused(404, f"no such route: {self.command} {self.route}")

    def whoami(self) -> int:
        if self._user() is None:
            raise _Refused(401, "Invalid username or password.")
        role = "write" if self._token() == self.hub.token else "read"
        return self._answer(
            200,
            {
                "type": "user",
                "name": "someone",
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": {"role": role}},
            },
        )

    def validate_yaml(self) -> int:
        content = json.loads(self.body)["content"]
        front = re.match(r"---\n(.*?)\n---\n", content, re.S)
        errors = [] if front else [{"message": "no front matter"}]
        return self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def create_repo(self) -> int:
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        self._writer(repo_id)
        if repo_id in self.hub.repos:
            url = f"{self.hub.url}/{repo_id}"
            return self._answer(
                409, {"error": "You already created this model repo", "url": url}, {}
            )
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.add_repo(repo_id, {}, private=bool(private))
        return self._answer(200, {"url": f"{self.hub.url}/{repo_id}", "id": repo_id})

    def settings(self, repo_id: str) -> int:
        self._writer(repo_id)
        asked = json.loads(self.body)
        repo = self._repo(repo_id)
        if "private" in asked:
            repo.private = asked["private"]
        if "visibility" in asked:
            repo.private = asked["visibility"] == "private"
        return self._answer(200, {})

    def info(self, repo_id: str, revision: str = "main") -> int:
        repo, oid = self._revision(repo_id, revision)
        return self._answer(
            200,
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": oid,
                "private": repo.private,
                "tags": [],
                "siblings": [{"rfilename": path} for path in repo.commits[oid]],
            },
        )

    def refs(self, repo_id: str) -> int:
        repo = self._repo(repo_id)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in repo.branches.items()
        ]
        return self._answer(200, {"branches": branches, "converts": [], "tags": []})

    def branch(self, repo_id: str, branch: str) -> int:
        self._writer(repo_id)
        repo = self._repo(repo_id)
        if self.command == "DELETE":
            if branch not in repo.branches:
                raise _Refused(404, "no such branch", "RevisionNotFound")
            del repo.branches[branch]
        else:
            if branch in repo.branches:
                raise _Refused(409, f"Reference already exists: {branch}")
            start = json.loads(self.body or b"{}").get("startingPoint", "main")
            repo.branches[branch] = self._revision(repo_id, start)[1]
        return self._answer(200, {})

    @staticmethod
    def _entry(path: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": len(blob.content),
            "oid": blob.git_oid,
        }
        if blob.lfs:
            entry["lfs"] = {
                "oid": blob.sha256,
                "size": len(blob.content),
                "pointerSize": len(blob.pointer),
            }
        return entry

    def tree(self, repo_id: str, revision: str) -> int:
        repo, oid = self._revision(repo_id, revision)
        return self._answer(200, [self._entry(p, b) for p, b in repo.commits[oid].items()])

    def paths_info(self, repo_id: str, revision: str) -> int:
        repo, oid = self._revision(repo_id, revision)
        if "json" in self.headers.get("Content-Type", ""):
            asked = json.loads(self.body)["paths"]
        else:
            asked = parse_qs(self.body.decode())["paths"]
        files = repo.commits[oid]
        return self._answer(200, [self._entry(p, files[p]) for p in asked if p in files])

    def preupload(self, repo_id: str, revision: str) -> int:
        self._writer(repo_id)
        repo, oid = self._revision(repo_id, revision)
        present = repo.commits[oid]
        answers = []
        for asked in json.loads(self.body)["files"]:
            path, sample = asked["path"], base64.b64decode(asked["sample"])
            lfs = self.hub.is_lfs(path, asked["size"], sample)
            answers.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": present[path].etag if path in present else None,
                }
            )
        return self._answer(200, {"files": answers, "commitOid": oid})

    def lfs_batch(self, repo_id: str) -> int:
        self._writer(repo_id)
        self._repo(repo_id)
        answers = []
        for asked in json.loads(self.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                upload: dict[str, Any] = {"href": f"{self.hub.storage_url}/storage/{oid}"}
                part = self.hub.part_size
                if part and size > part:
                    count = -(-size // part)
                    urls = {str(n): f"{upload['href']}/{n}" for n in range(1, count + 1)}
                    upload = {
                        "href": f"{self.hub.url}/storage/{oid}/complete",
                        "header": {"chunk_size": str(part), **urls},
                    }
                verify = {"href": f"{self.hub.url}/storage/{oid}/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        return self._answer(200, {"transfer": "basic", "objects": answers})

    def store(self, oid: str) -> int:
        self.hub.objects[oid] = self.body
        return self._answer(200)

    def store_part(self, oid: str, part: str) -> int:
        self.hub.parts[oid, int(part)] = self.body
        return self._answer(200, b"", {"ETag": hashlib.md5(self.body).hexdigest()})

    def complete(self, oid: str) -> int:
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self.hub.objects[oid] = b"".join(self.hub.parts.pop((oid, n)) for n in numbers)
        return self._answer(200, {})

    def verify_object(self, oid: str) -> int:
        content = self.hub.objects.get(oid)
        if content is None or hashlib.sha256(content).hexdigest() != oid:
            self.hub.objects.pop(oid, None)
            raise _Refused(422, "the uploaded content does not have the hash it was given for")
        return self._answer(200, {})

    def commit(self, repo_id: str, revision: str) -> int:
        self._writer(repo_id)
        repo, head = self._revision(repo_id, revision)
        files = dict(repo.commits[head])
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                parent = value.get("parentCommit")
                if parent is not None and parent != head:
                    raise _Refused(412, "A commit has happened since. Please refresh and try again")
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                stored = self.hub.objects.get(value["oid"])
                if stored is None:
                    known = (b for c in repo.commits.values() for b in c.values() if b.lfs)
                    stored = next((b.content for b in known if b.sha256 == value["oid"]), None)
                if stored is None:
                    raise _Refused(400, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = Blob(stored, lfs=True)
            elif key == "deletedFile":
                files.pop(value["path"])
            else:
                raise _Refused(400, f"unknown operation {key}")
        oid = repo.commit(revision, files)
        return self._answer(
            200,
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}",
            },
        )

    def resolve(self, repo_id: str, revision: str, path: str) -> int:
        repo, oid = self._revision(repo_id, revision)
        blob = repo.commits[oid].get(path)
        about = {"X-Repo-Commit": oid}
        if blob is None:
            self.send_response(404)
            for name, value in {
                **about,
                "X-Error-Code": "EntryNotFound",
                "X-Error-Message": "Entry not found",
                "Content-Length": "0",
            }.items():
                self.send_header(name, value)
            self.end_headers()
            return 404
        if blob.lfs:
            self.hub.objects.setdefault(blob.sha256, blob.content)
            return self._answer(
                302,
                b"",
                {
                    **about,
                    "X-Linked-Etag": f'"{blob.sha256}"',
                    "X-Linked-Size": str(len(blob.content)),
                    "Location": f"{self.hub.storage_url}/storage/{blob.sha256}",
                },
            )
        return self._content(blob.content, {**about, "ETag": f'"{blob.git_oid}"'})

    def serve_object(self, oid: str) -> int:
        return self._content(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> int:
        headers = {"Accept-Ranges": "bytes", **headers}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if self.command == "HEAD":
            return self._answer(200, b"", {**headers, "Content-Length": str(len(content))})
        if not asked or (self.fault and self.fault.no_ranges):
            return self._answer(200, content, headers)
        start, total = int(asked[1]), len(content)
        if start >= total:
            raise _Refused(416, "Range Not Satisfiable")
        end = min(int(asked[2]) + 1, total) if asked[2] else total
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
        return self._answer(206, content[start:end], headers)


_REPO = r"(?P<repo_id>[^/]+/[^/]+)"
_REV = r"(?P<revision>[^/]+|refs/pr/\d+)"
_OID = r"(?P<oid>[0-9a-f]{64})"
#: methods, path, the handler's method. First match wins.
_ROUTES: list[tuple[tuple[str, ...], str, str]] = [
    (("GET",), "/api/whoami-v2", "whoami"),
    (("POST",), "/api/validate-yaml", "validate_yaml"),
    (("POST",), "/api/repos/create", "create_repo"),
    (("PUT",), f"/api/models/{_REPO}/settings", "settings"),
    (("GET",), f"/api/models/{_REPO}/refs", "refs"),
    (("POST", "DELETE"), f"/api/models/{_REPO}/branch/(?P<branch>.+)", "branch"),
    (("GET",), f"/api/models/{_REPO}/tree/{_REV}", "tree"),
    (("GET",), f"/api/models/{_REPO}/revision/{_REV}", "info"),
    (("GET",), f"/api/models/{_REPO}", "info"),
    (("POST",), f"/api/models/{_REPO}/paths-info/{_REV}", "paths_info"),
    (("POST",), f"/api/models/{_REPO}/preupload/{_REV}", "preupload"),
    (("POST",), f"/api/models/{_REPO}/commit/{_REV}", "commit"),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    (("POST",), f"/storage/{_OID}/complete", "complete"),
    (("POST",), f"/storage/{_OID}/verify", "verify_object"),
    (("PUT",), f"/storage/{_OID}/(?P<part>[0-9]+)", "store_part"),
    (("PUT",), f"/storage/{_OID}", "store"),
    (("GET", "HEAD"), f"/storage/{_OID}", "serve_object"),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/{_REV}/(?P<path>.+)", "resolve"),
]
