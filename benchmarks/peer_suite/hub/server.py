"""Serves the stand-in as a hub on this machine: the few endpoints that `from_pretrained` and its like ask."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from pathlib import Path
from typing import ClassVar

from benchmarks.peer_suite.hub.repos import home


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[Path]

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests' own output is what counts."""

    def do_GET(self) -> None:
        """A file, what is in a repository, or 404 with the hub's own header."""
        url = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if found := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", url):
            self._file(*found.groups())
        elif found := re.fullmatch(r"/api/models/(.+?)/(?:revision|(tree))/([^/]+)(?:/(.*))?", url):
            self._listing(found[1], found[3], within=found[4] or "", tree=bool(found[2]))
        elif url.startswith("/api/models/"):
            self._listing(url.removeprefix("/api/models/"), "main")
        else:
            self._missing("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Nothing can be written here."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._missing("EntryNotFound")

    def _reply(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, kind: str, **headers: str) -> None:
        self._reply(404, X_Error_Code=kind, X_Error_Message=kind, **headers)

    def _snapshot(self, name: str, revision: str) -> Path | None:
        """The folder of a revision; its name is the commit. None: 404 has been said."""
        base = home(self.hub, name)
        if not base.is_dir():
            self._missing("RepoNotFound")
            return None
        ref = base / "refs" / revision
        folder = base / "snapshots" / (ref.read_text(encoding="utf-8") if ref.is_file() else revision)
        if not folder.is_dir():
            self._missing("RevisionNotFound")
            return None
        return folder

    def _file(self, name: str, revision: str, path: str) -> None:
        folder = self._snapshot(name, revision)
        if folder is None:
            return
        file = folder / path
        if not file.is_file():
            self._missing("EntryNotFound", X_Repo_Commit=folder.name)
            return
        content = file.read_bytes()
        etag = hashlib.sha1(f"{folder.name}/{path}/{len(content)}".encode()).hexdigest()
        self._reply(200, content, X_Repo_Commit=folder.name, ETag=f'"{etag}"')

    def _listing(self, name: str, revision: str, within: str = "", tree: bool = False) -> None:
        folder = self._snapshot(name, revision)
        if folder is None:
            return
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        data: object = {
            **{
                "_id": folder.name[:24],
                "id": name,
                "modelId": name,
                "sha": folder.name,
                "private": False,
                "gated": False,
            },
            **{"tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": path} for path in files]},
        }
        if tree:
            inside = {
                path: file
                for path, file in files.items()
                if path.startswith(f"{within.rstrip('/')}/" if within else "")
            }
            if within and not inside:
                self._missing("EntryNotFound")
                return
            data = [
                {"type": "file", "path": path, "size": file.stat().st_size, "oid": folder.name}
                for path, file in inside.items()
            ]
        self._reply(200, json.dumps(data).encode(), Content_Type="application/json", X_Repo_Commit=folder.name)


def serve(hub: Path) -> str:
    """Start serving in a thread of this process; the address, for `HF_ENDPOINT`."""
    handler = type("_HubHandler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"
