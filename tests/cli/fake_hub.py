"""A local server that accepts a commit with large files as the real hub does, and stores what it receives."""

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from servers import Handler, running


@dataclass
class Hub:
    """The requests that the server received, and the files that it offers.

    Attributes:
        refuse: Prefix of the paths that it answers with an error, which repeats the token that it received.
        tokens: Tokens of the requests that had one.
        created: The request to create a repository.
        large: Files uploaded outside a commit, by SHA-256.
        commits: Files and contents of each commit; None for a removed file.
        there: Files in its repositories.
        models: Repositories that exist, and whether they are private.
    """

    refuse: str = "/none"
    endpoint: str = ""
    tokens: set[str] = field(default_factory=set)
    created: dict[str, Any] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, bytes | None]] = field(default_factory=list)
    there: tuple[str, ...] = ()
    models: dict[str, bool] = field(default_factory=dict)

    def answer(self, path: str, body: bytes) -> Any:
        """Returns the JSON answer to a request."""
        if path == "/api/repos/create":
            self.created = json.loads(body)
            name = f"{self.created['organization']}/{self.created['name']}"
            self.models.setdefault(name, self.created.get("visibility") == "private")
            return {"url": f"{self.endpoint}/{name}"}
        if "/preupload/" in path:
            modes = {True: "lfs", False: "regular"}
            return {
                "files": [
                    {"path": name, "uploadMode": modes[name.endswith(".safetensors")], "shouldIgnore": False}
                    for name in (file["path"] for file in json.loads(body)["files"])
                ]
            }
        if path.endswith("/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            upload = {each["oid"]: {"upload": {"href": f"{self.endpoint}/large/{each['oid']}"}} for each in wanted}
            return {"transfer": "basic", "objects": [each | {"actions": upload[each["oid"]]} for each in wanted]}
        if "/tree/" in path:
            return [{"type": "file", "path": name, "size": 1, "oid": "1"} for name in self.there]
        if (repo := path.removeprefix("/api/models/")) in self.models:
            files = [{"rfilename": name} for name in self.there]
            return {"id": repo, "private": self.models[repo], "siblings": files}
        if "/commit/" in path:
            self.commits.append(dict(self._file(line) for line in map(json.loads, body.splitlines()[1:])))
            return {"commitUrl": f"{self.endpoint}/owner/name/commit/1", "commitOid": "1"}
        return {"errors": [], "warnings": []}  # the validation of a model card's metadata

    def _file(self, line: dict[str, Any]) -> tuple[str, bytes | None]:
        value = line["value"]
        if line["key"] == "deletedFile":
            return value["path"], None
        large = line["key"] == "lfsFile"
        return value["path"], self.large[value["oid"]] if large else base64.b64decode(value["content"])


class _Handler(Handler):
    hub: Hub

    def do_HEAD(self) -> None:
        if self.path == "/":
            self.answer(200)
        else:
            self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"")

    def do_PUT(self) -> None:
        self.hub.large[self.path.rpartition("/")[2]] = self._body()
        self.answer(200, b"{}")

    def do_POST(self) -> None:
        self._answer(self._body())

    def _answer(self, body: bytes) -> None:
        sent = self.headers.get("authorization", "")
        self.hub.tokens |= {sent.removeprefix("Bearer ")} if sent else set()
        if self.path.startswith(self.hub.refuse):
            said = f"you sent {sent}"
            self.answer(403, json.dumps({"error": said}).encode(), {"X-Error-Message": said})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+", self.path) and self.path[12:] not in self.hub.models:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        else:
            about = json.dumps(self.hub.answer(self.path, body)).encode()
            self.answer(200, about, {"Content-Type": "application/json"})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))


@contextmanager
def serving(refuse: str = "/none") -> Iterator[Hub]:
    """Serves a hub while the block runs."""
    hub = Hub(refuse)
    with running(type("OfThisHub", (_Handler,), {"hub": hub})) as hub.endpoint:
        yield hub
