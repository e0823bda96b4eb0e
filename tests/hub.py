"""A hub for tests: serves a folder over the HTTP interface of huggingface.co, as far as reading needs it.

ROOT/models/OWNER/NAME/REVISION/...   and   ROOT/datasets/OWNER/NAME/REVISION/...
A repository whose name ends in "gated" is refused, as one whose terms were not accepted; one that ends in "stopping"
lists its weights, but does not send them.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

_REPO = r"([^/]+/[^/]+)"
_API = re.compile(rf"/api/(models|datasets)/{_REPO}(?:/(revision|tree|paths-info|commits)/([^/]+))?(?:/(.+))?")
_FILE = re.compile(rf"/(?:(datasets)/)?{_REPO}/resolve/([^/]+)/(.+)")


def commit(folder: Path) -> str:
    """Of the content: a folder with other files is another commit."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return hashlib.sha1(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


class _Refused(Exception):
    """Error code of the hub, HTTP status, and the commit if it is known."""


@contextmanager
def served(root: Path) -> Iterator[str]:
    """The address at which the hub answers."""
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"root": root})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    root: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urlparse(self.path)
        path, asked = unquote(url.path), parse_qs(url.query)
        posted = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if match := _FILE.fullmatch(path):
                self._file(match[1] or "models", *match.groups()[1:])
            elif match := _API.fullmatch(path):
                self._answer(200, json.dumps(self._about(*match.groups(), asked, posted)).encode())
            else:
                raise _Refused("EntryNotFound", 404, None)
        except _Refused as refused:
            code, status, known = refused.args
            self._answer(status, b"{}", {"X-Error-Code": code} | ({"X-Repo-Commit": known} if known else {}))

    do_HEAD = do_POST = do_GET

    def _folder(self, kind: str, repo: str, revision: str) -> Path:
        if repo.endswith("gated"):
            raise _Refused("GatedRepo", 401, None)
        if not (folder := self.root / kind / repo).is_dir():
            raise _Refused("RepoNotFound", 401, None)
        for known in folder.iterdir():
            if revision in (known.name, commit(known)):
                return known
        raise _Refused("RevisionNotFound", 404, None)

    def _about(
        self, kind: str, repo: str, what: str | None, revision: str | None, place: str | None, asked: Any, posted: bytes
    ) -> Any:
        folder = self._folder(kind, repo, revision or "main")
        entries = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*"))}
        if what == "commits":
            return []
        if what == "tree":
            if place and place not in entries:
                raise _Refused("EntryNotFound", 404, None)
            found = {name: file for name, file in entries.items() if name.startswith(f"{place}/" if place else "")}
            is_deep = asked.get("recursive", ["false"])[0].lower() == "true"
            return [_entry(n, f) for n, f in found.items() if is_deep or f.parent == folder / (place or "")]
        if what == "paths-info":
            return [_entry(name, entries[name]) for name in json.loads(posted)["paths"] if name in entries]
        files = [{"rfilename": name} for name, file in entries.items() if file.is_file()]
        return {"id": repo, "sha": commit(folder), "private": False, "siblings": files}

    def _file(self, kind: str, repo: str, revision: str, name: str) -> None:
        folder = self._folder(kind, repo, revision)
        known = commit(folder)
        if not (folder / name).is_file():
            raise _Refused("EntryNotFound", 404, known)
        if repo.endswith("stopping") and name.endswith(".safetensors"):
            raise _Refused("Unknown", 400, known)
        content = (folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": known, "Accept-Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content = content[first : last + 1]
        self._answer(206 if part else 200, content, headers)

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(name: str, file: Path) -> dict[str, Any]:
    kind, size = ("file", file.stat().st_size) if file.is_file() else ("directory", 0)
    return {"type": kind, "path": name, "size": size, "oid": hashlib.sha1(name.encode()).hexdigest()}
