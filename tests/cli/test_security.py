"""Limits of untrusted files and servers; the rest of ``docs/security.md`` is tested where the files are read."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from commands import STORIES, apart, token_file
from fake_hub import serving

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


def test_a_hub_token_is_never_shown(ask_hub: Callable[..., None], tmp_path: Path):
    with serving("/") as hub:
        ask_hub(hub.endpoint, SECRET)
        code, out, err = apart("eval", "owner/secret-model", "--data", token_file(tmp_path / "ids.npy"))
    assert code == 2, err
    assert hub.tokens == {SECRET}  # the token was sent, so an answer could repeat it
    assert SECRET not in out + err
    assert "owner/secret-model" in err
    assert "you sent Bearer the token" in err  # the repeated token, redacted
