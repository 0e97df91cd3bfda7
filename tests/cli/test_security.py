"""Limits of untrusted files and servers; the rest of ``docs/security.md`` is tested where the files are read."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from commands import STORIES, apart, token_file

import spap_jax as spap

SECRET = "hf_abcdefghijklmnopqrstuvwxyz12345678"


def test_a_tokenizers_own_code_is_not_run(tmp_path: Path):
    folder, marker = tmp_path / "in", tmp_path / "ran"
    folder.mkdir()
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_bytes((STORIES / name).read_bytes())
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    code = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(code))
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat.\n\n" * 40)
    with contextlib.suppress(spap.UserError):  # it may work without the code, or report that it cannot
        spap.load_tokens(text, tokenizer=folder, sequence_length=16, sequences=2, role="calibration")
    assert not marker.exists()


class Echo(BaseHTTPRequestHandler):
    """A reachable hub that refuses every request, and repeats what it received."""

    seen: list[str]

    def do_HEAD(self) -> None:
        self._answer(200 if self.path == "/" else 403)

    def do_GET(self) -> None:
        self._answer(403)

    def _answer(self, code: int) -> None:
        sent = str(self.headers.get("authorization"))
        self.seen.append(sent)
        body = json.dumps({"error": f"you sent {sent}"}).encode()
        self.send_response(code)
        self.send_header("X-Error-Message", f"you sent {sent}")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def echo() -> Iterator[tuple[str, list[str]]]:
    seen: list[str] = []
    server = HTTPServer(("127.0.0.1", 0), type("Handler", (Echo,), {"seen": seen}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_token_is_never_shown(echo: tuple[str, list[str]], ask_hub: Callable[..., None], tmp_path: Path):
    endpoint, seen = echo
    ask_hub(endpoint, SECRET)
    code, out, err = apart("eval", "owner/secret-model", "--data", token_file(tmp_path / "ids.npy"))
    assert code == 2, err
    assert any(SECRET in sent for sent in seen)  # the token was sent, so an answer could repeat it
    assert SECRET not in out + err
    assert "owner/secret-model" in err
    assert "you sent Bearer the token" in err  # the repeated token, redacted
