"""A Hugging Face Hub on loopback, in memory, that the real clients push to and pull from.

It answers what huggingface_hub, diffusers and datasets ask for: accounts by token, private repositories, commits with
their parents, Git LFS uploads, listings and downloads. As on the Hub, a repository that is private to somebody else
looks like one that does not exist.

    with LocalHub({"hf_alice": "alice"}) as hub:
        hub.url                              # for HF_ENDPOINT, before huggingface_hub is first imported
        hub.files("alice/digits")            # {path: bytes} of the newest commit
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


REPO_TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt", ".parquet", ".arrow", ".png", ".jpg")
POINTER_SIZE = 134  # bytes of a Git LFS pointer file


@dataclass(frozen=True)
class File:
    data: bytes
    is_lfs: bool

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id

    @property
    def lfs(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "oid": self.sha256, "size": len(self.data), "pointerSize": POINTER_SIZE}

    def describe(self, path: str) -> dict[str, Any]:
        described = {"type": "file", "path": path, "size": len(self.data), "oid": self.blob_id}
        return described | ({"lfs": self.lfs} if self.is_lfs else {})

    def describe_sibling(self, path: str, with_blobs: bool) -> dict[str, Any]:
        if not with_blobs:
            return {"rfilename": path}
        described = {"rfilename": path, "size": len(self.data), "blobId": self.blob_id}
        return described | ({"lfs": self.lfs} if self.is_lfs else {})


@dataclass(frozen=True)
class Commit:
    id: str
    title: str
    date: str
    files: dict[str, File]
    parent: str | None


@dataclass
class Repo:
    """One repository: every commit it ever had, and the branches and tags that name some of them."""

    type: str
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "main")

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def commit(self, title: str, files: dict[str, File], branch: str) -> str:
        # By content, as in Git: clients take a commit that they have seen from their cache.
        content = [self.branches.get(branch), title, *[(path, file.blob_id) for path, file in sorted(files.items())]]
        commit_id = hashlib.sha1(repr(content).encode()).hexdigest()
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits[commit_id] = Commit(commit_id, title, date, files, self.branches.get(branch))
        self.branches[branch] = commit_id
        return commit_id

    def at(self, revision: str) -> Commit:
        commit_id = self.branches.get(revision) or self.tags.get(revision) or revision
        if commit_id not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[commit_id]


class Refusal(Exception):
    """An answer other than success: status, message and the Hub's error code."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class LocalHub:
    """A Hub that lives while the context is open.

    Args:
        tokens: Account name by access token. Every other token is refused.
    """

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []  # method, path, status
        # A status for requests by their number, from 0, and their path.
        self.refuse: Callable[[int, str], int | None] = lambda number, path: None
        self.lock = threading.RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "LocalHub":
        serve = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        serve.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str, repo_type: str = "model", branch: str = "main") -> dict[str, bytes]:
        """Content by path at the head of a branch."""
        return {path: file.data for path, file in self.repos[repo_type, repo_id].at(branch).files.items()}

    def titles(self, repo_id: str, repo_type: str = "model") -> list[str]:
        """The titles of all commits, oldest first."""
        return [commit.title for commit in self.repos[repo_type, repo_id].commits.values()]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every reply waits 40 ms for a delayed acknowledgement
    hub: LocalHub

    def log_message(self, *_):
        pass  # the base class prints every request

    def answer(self):
        self.body = self.read_body()
        try:
            with self.hub.lock:
                if status := self.hub.refuse(len(self.hub.requests), self.path):
                    raise Refusal(status, "the test wants it so")
                self.route()
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self.reply({"error": refusal.message}, refusal.status, headers)
        except BrokenPipeError:
            pass  # the client went away, as those of a killed test do

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, body: Any = b"", status: int = 200, headers: dict[str, str] | None = None):
        content_type = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.hub.requests.append((self.command, self.path, status))

    # Who asks, and what they may see.

    def account(self) -> str | None:
        authorization = self.headers.get("Authorization")
        if not authorization:
            return None
        account = self.hub.tokens.get(authorization.removeprefix("Bearer ").strip())
        if account is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return account

    def signed_in(self) -> str:
        account = self.account()
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        return account

    def readable(self, repo_type: str, repo_id: str) -> Repo:
        account, repo = self.account(), self.hub.repos.get((repo_type, repo_id))
        if repo is None or (repo.private and account != repo.owner):
            # Hidden and missing look alike: 401 to the anonymous, 404 to everybody else.
            raise Refusal(401 if account is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, repo_type: str, repo_id: str) -> Repo:
        repo = self.readable(repo_type, repo_id)
        if self.signed_in() != repo.owner:
            raise Refusal(403, "You don't have the rights to write to this repo")
        return repo

    # What they ask for.

    def route(self):
        address = urlsplit(self.path)
        path, self.query = address.path, parse_qs(address.query)
        repo = r"(?:(datasets|spaces)/)?([^/]+/[^/]+)"
        if path == "/api/whoami-v2":
            account = self.signed_in()
            access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
            self.reply(
                {"type": "user", "id": account, "name": account, "fullname": account, "orgs": [], "auth": access}
            )
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(self.body))
        elif path == "/api/repos/delete":
            request = json.loads(self.body)
            repo_id = f"{request.get('organization') or self.signed_in()}/{request['name']}"
            found = self.writable(request.get("type", "model"), repo_id)
            del self.hub.repos[found.type, found.id]
            self.reply({})
        elif match := re.fullmatch(r"/_lfs/([0-9a-f]{64})", path):
            if hashlib.sha256(self.body).hexdigest() != match[1]:
                raise Refusal(400, "The content does not have this hash")
            self.hub.lfs[match[1]] = self.body
            self.reply()
        elif match := re.fullmatch(rf"/{repo}\.git/info/lfs/objects/batch", path):
            self.writable(REPO_TYPES.get(match[1], "model"), match[2])
            objects = [self.lfs_object(o["oid"], o["size"]) for o in json.loads(self.body)["objects"]]
            self.reply({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(
            r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/([^/]+)(?:/([^/]+)(?:/(.+))?)?)?", path
        ):
            found = REPO_TYPES[match[1]], unquote(match[2])
            verb, revision, rest = match[3] or "", unquote(match[4] or "main"), unquote(match[5] or "")
            self.ask_repo(*found, f"{self.command} {verb}", revision, rest)
        elif match := re.fullmatch(rf"/{repo}/(?:resolve|raw)/([^/]+)/(.+)", path):
            self.download(REPO_TYPES.get(match[1], "model"), *(unquote(part) for part in match.groups()[1:]))
        else:
            raise Refusal(404, "Not found")

    def create(self, request: dict[str, Any]):
        account, repo_type = self.signed_in(), request.get("type", "model")
        namespace = request.get("organization") or account
        if namespace != account:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        repo_id = f"{namespace}/{request['name']}"
        url = f"{self.hub.url}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"
        if (repo_type, repo_id) in self.hub.repos:
            message = "You already created this model repo"
            return self.reply({"error": message, "url": url}, 409, {"X-Error-Message": message})
        private = bool(request.get("private")) or request.get("visibility") == "private"
        self.hub.repos[repo_type, repo_id] = Repo(repo_type, repo_id, private)
        self.reply({"url": url, "name": repo_id, "id": repo_id})

    def lfs_object(self, oid: str, size: int) -> dict[str, Any]:
        known = oid in self.hub.lfs
        actions = {} if known else {"actions": {"upload": {"href": f"{self.hub.url}/_lfs/{oid}"}}}
        return {"oid": oid, "size": size, **actions}

    def ask_repo(self, repo_type: str, repo_id: str, request: str, revision: str, rest: str):
        match request:
            case "GET " | "GET revision":
                self.reply(self.describe(self.readable(repo_type, repo_id), revision))
            case "GET tree":
                self.reply(self.tree(self.readable(repo_type, repo_id).at(revision), rest))
            case "POST paths-info":
                files = self.readable(repo_type, repo_id).at(revision).files
                is_json = "json" in self.headers.get("Content-Type", "")
                wanted = (json.loads(self.body) if is_json else parse_qs(self.body.decode())).get("paths", [])
                self.reply([files[path].describe(path) for path in wanted if path in files])
            case "GET refs":
                repo = self.readable(repo_type, repo_id)
                branches = self.describe_refs("heads", repo.branches)
                self.reply({"branches": branches, "tags": self.describe_refs("tags", repo.tags), "converts": []})
            case "GET commits":
                self.reply(self.history(self.readable(repo_type, repo_id), revision))
            case "POST preupload":
                files = self.writable(repo_type, repo_id).at(revision).files
                self.reply({"files": [self.upload_mode(asked, files) for asked in json.loads(self.body)["files"]]})
            case "POST branch":
                repo = self.writable(repo_type, repo_id)
                if revision in repo.branches:
                    raise Refusal(409, f"Reference already exists: {revision}")
                repo.branches[revision] = repo.at(json.loads(self.body or b"{}").get("startingPoint", "main")).id
                self.reply({})
            case "DELETE branch":
                del self.writable(repo_type, repo_id).branches[revision]
                self.reply({})
            case "POST commit":
                self.commit(self.writable(repo_type, repo_id), revision)
            case "PUT settings":
                repo, settings = self.writable(repo_type, repo_id), json.loads(self.body)
                repo.private = settings.get("private", settings.get("visibility") == "private")
                self.reply({"private": repo.private})
            case _:
                raise Refusal(404, "Not found")

    def describe(self, repo: Repo, revision: str) -> dict[str, Any]:
        commit = repo.at(revision)
        siblings = [file.describe_sibling(path, "blobs" in self.query) for path, file in sorted(commit.files.items())]
        return {
            "_id": repo.id,
            "id": repo.id,
            "author": repo.owner,
            "sha": commit.id,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "lastModified": commit.date,
            "createdAt": next(iter(repo.commits.values())).date,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }

    def tree(self, commit: Commit, base: str) -> list[dict[str, Any]]:
        prefix = f"{base.strip('/')}/" if base else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = {}
        for path, file in sorted(commit.files.items()):
            if not path.startswith(prefix):
                continue
            folders = path.removeprefix(prefix).split("/")[:-1]
            for depth in range(1, len(folders) + 1 if recursive else min(len(folders), 1) + 1):
                folder = prefix + "/".join(folders[:depth])
                entries[folder] = {"type": "directory", "path": folder, "size": 0}
                entries[folder]["oid"] = hashlib.sha1(folder.encode()).hexdigest()
            if recursive or not folders:
                entries[path] = file.describe(path)
        if base and not entries:
            raise Refusal(404, f"{base} does not exist", "EntryNotFound")
        return list(entries.values())

    @staticmethod
    def describe_refs(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": target} for name, target in refs.items()]

    @staticmethod
    def history(repo: Repo, revision: str) -> list[dict[str, Any]]:
        commit, history = repo.at(revision), []
        while commit is not None:
            author = [{"user": repo.owner}]
            history.append(
                {"id": commit.id, "title": commit.title, "message": "", "date": commit.date, "authors": author}
            )
            commit = repo.commits.get(commit.parent)
        return history

    @staticmethod
    def upload_mode(asked: dict[str, Any], files: dict[str, File]) -> dict[str, Any]:
        path, present = asked["path"], files.get(asked["path"])
        mode = "lfs" if path.endswith(LFS_SUFFIXES) or asked["size"] > 10_000_000 else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False} | ({"oid": present.etag} if present else {})

    def commit(self, repo: Repo, branch: str):
        parent = repo.at(branch)
        files, header = dict(parent.files), {}
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    header = value
                case "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), False)
                case "lfsFile":
                    if value["oid"] not in self.hub.lfs:
                        raise Refusal(400, f"LFS object {value['oid']} was never uploaded")
                    files[value["path"]] = File(self.hub.lfs[value["oid"]], True)
                case "deletedFile":
                    files.pop(value["path"], None)
                case "deletedFolder":
                    files = {
                        path: f for path, f in files.items() if not path.startswith(value["path"].rstrip("/") + "/")
                    }
        if header.get("parentCommit") not in (None, parent.id):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        commit_id = repo.commit(header.get("summary", ""), files, branch)
        url = f"{self.hub.url}/{'' if repo.type == 'model' else repo.type + 's/'}{repo.id}/commit/{commit_id}"
        self.reply({"success": True, "commitOid": commit_id, "commitUrl": url, "hookOutput": ""})

    def download(self, repo_type: str, repo_id: str, revision: str, path: str):
        commit = self.readable(repo_type, repo_id).at(revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        file = commit.files[path]
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or self.command != "GET":
            return self.reply(file.data, headers=headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(file.data) - 1), len(file.data) - 1)
        if first > last:
            return self.reply(b"", 416, {"Content-Range": f"bytes */{len(file.data)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(file.data)}"
        self.reply(file.data[first : last + 1], 206, headers)
