"""A Hub on loopback: enough of its HTTP interface for the real `huggingface_hub` client to create repositories, commit
and fetch, push large files, resolve revisions, and be refused without a token, and for `datasets` to read a data set's
files, whole or in ranges. It is all in memory."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


TOKENS = {"hf_alice": "alice", "hf_bob": "bob"}
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    """Files by revision; a commit is a whole tree."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        parent = self.branches.get(branch, "")
        content = repr((parent, sorted((k, hashlib.sha256(v).hexdigest()) for k, v in files.items())))
        name = hashlib.sha1(content.encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    def revision(self, name: str) -> str | None:
        name = self.branches.get(name, name)
        return name if name in self.commits else None


class FakeHub:
    """Listens while it is a context; `url` is what HF_ENDPOINT must say."""

    def __init__(self):
        self.repos: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []

    def __enter__(self) -> "FakeHub":
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repos[repo]
        return found.commits[found.revision(revision)]


def described(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content=b"", status: int = 200, headers: dict | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Length": str(len(body)), "Content-Type": "application/json"} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.answer({"error": message}, status, headers)

    @property
    def user(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.body()
        for method, pattern, action in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return action(self, body=body, **found.groupdict())
        self.refuse(404, "EntryNotFound", f"no route for {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def repository(self, name: str, write: bool = False) -> Repository | None:
        """The repository, if this user may see it; a private one is to others as if it were not there."""
        found = self.hub.repos.get(name)
        if found is None or (found.private and self.user != name.split("/")[0]):
            self.refuse(401 if self.user is None else 404, "RepoNotFound", "Repository not found")
            return None
        if write and self.user != name.split("/")[0]:
            self.refuse(403 if self.user else 401, "", "You don't have write access to this repository")
            return None
        return found

    def tree_of(self, repo: str, revision: str) -> tuple[str | None, dict[str, bytes]]:
        """A revision's commit and files; None, and the request is answered, where there is none to see."""
        found = self.repository(repo)
        name = found and found.revision(revision)
        if found is not None and name is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return name, found.commits[name] if name else {}

    # ----- routes

    def whoami(self, body):
        if self.user is None:
            return self.refuse(401, "", "Invalid user token.")
        self.answer({"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, body):
        asked = json.loads(body)
        if self.user is None:
            return self.refuse(401, "", "Invalid username or password.")
        name = f"{asked.get('organization') or self.user}/{asked['name'].split('/')[-1]}"
        if name.split("/")[0] != self.user:
            return self.refuse(403, "", f"You don't have the rights to create {name}")
        if name in self.hub.repos:
            return self.answer({"error": "You already created this repo", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repos[name] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
        self.hub.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def branch(self, body, repo, branch):
        found = self.repository(repo, write=True)
        if found is None:
            return
        if branch in found.branches:
            return self.answer({"error": "Reference already exists"}, 409)
        found.branches[branch] = found.branches["main"]
        self.answer({})

    def preupload(self, body, repo, revision):
        if self.repository(repo, write=True) is not None:
            large = (".safetensors", ".parquet", ".png")
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            self.answer({"files": files})

    def batch(self, body, repo):
        if self.repository(repo, write=True) is None:
            return
        objects = []
        for item in json.loads(body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.large:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append(entry)
        self.answer({"transfer": "basic", "objects": objects})

    def put_large(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refuse(400, "", "wrong digest")
        self.hub.large[oid] = body
        self.answer()

    def commit(self, body, repo, revision):
        found = self.repository(repo, write=True)
        if found is None:
            return
        files = dict(found.commits[found.revision(revision)])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        name = found.commit(revision, files)
        url = f"{self.hub.url}/{repo}/commit/{name}"
        self.answer({"success": True, "commitOid": name, "commitUrl": url, "hookOutput": ""})

    def validate(self, body):
        self.answer({"errors": [], "warnings": []})

    def info(self, body, repo, revision="main"):
        name, files = self.tree_of(repo, revision)
        if name is None:
            return
        siblings = [{"rfilename": path} for path in sorted(files)]
        content = {
            "id": repo,
            "modelId": repo,
            "sha": name,
            "private": self.hub.repos[repo].private,
            "siblings": siblings,
            "tags": [],
        }
        self.answer(content)

    def tree(self, body, repo, revision, under=""):
        name, files = self.tree_of(repo, revision)
        if name is None:
            return
        begins = f"{under}/" if under else ""
        files = {path: content for path, content in files.items() if path.startswith(begins)}
        if under and not files:
            return self.refuse(404, "EntryNotFound", f"{under} does not exist")
        inner = [path.removeprefix(begins).split("/") for path in files]
        folders = {begins + "/".join(parts[:depth]) for parts in inner for depth in range(1, len(parts))}
        entries = [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]
        entries += [described(path, content) for path, content in sorted(files.items())]
        if parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(begins)]
        self.answer(entries)

    def resolve(self, body, repo, revision, path):
        name, files = self.tree_of(repo, revision)
        if name is None:
            return
        content = files.get(path)
        if content is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": name}
            return self.answer({"error": "Entry not found"}, 404, headers)
        tag = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": name, "ETag": f'"{tag}"', "Content-Type": "application/octet-stream"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            return self.answer(content, 200, headers)
        start, end = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self.answer(content[start : end + 1], 206, headers)


ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", rf"/api/models/{REPO}/branch/(?P<branch>.+)", Handler.branch),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>.+)", Handler.commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", Handler.put_large),
    ("GET", rf"/api/models/{REPO}/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<under>.+))?", Handler.tree),
    ("GET", rf"/api/models/{REPO}", Handler.info),
    ("GET", rf"/api/datasets/{REPO}/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", rf"/api/datasets/{REPO}/tree/(?P<revision>[^/]+)(/(?P<under>.+))?", Handler.tree),
    ("GET", rf"/api/datasets/{REPO}", Handler.info),
    ("GET HEAD", rf"/datasets/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    ("GET HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
