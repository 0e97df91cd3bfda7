"""The benchmark of chat models, on a tiny model whose tokenizer has a chat template."""

import functools
import re
import shutil
from pathlib import Path

import pytest

import spap_jax as spap
from benchmarks.chat.__main__ import main, rows

pytestmark = pytest.mark.usefixtures("optimized")
STORIES = Path(__file__).parents[2] / "examples" / "llama-stories"
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "chat"
    shutil.copytree(STORIES, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return str(folder)


def test_held_out_conversations_are_others():
    asked = [{each["messages"][0]["content"] for each in rows(name)} for name in ("calibration", "held_out")]
    assert [len(words) for words in asked] == [69, 20]
    assert not asked[0] & asked[1]


@pytest.mark.filterwarnings("ignore:.* cut off after")
def test_every_way_is_measured(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page, few = tmp_path / "chat.md", {name: rows(name)[:10] for name in ("calibration", "held_out")}
    monkeypatch.setattr("benchmarks.chat.__main__.rows", few.get)
    monkeypatch.setattr(spap, "prune", functools.partial(spap.prune, method="wanda"))
    main(model, sparsity=0.5, sequences=4, sequence_length=64, answers=2, output=page)
    said = page.read_text("utf-8")
    dense, *found = re.findall(r"^\| .*? \| (\d+\.\d+) \| .* \|$", said, re.MULTILINE)
    assert len(set(found)) == 4
    assert min(map(float, [dense, *found])) > 1
    assert re.search(r"^- plain text: the given text: 4 of \d+ windows of 64 tokens", said, re.MULTILINE)
    assert "tokens that the assistant wrote" in said.partition("- conversations: ")[2]
