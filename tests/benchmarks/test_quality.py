"""The table of small models: runs are not repeated, and each is compared with the best peer on the same seed."""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import quality
from benchmarks.quality import Row, cases_of, draw, main, markdown, ratio
from benchmarks.shared import ROOT, commit, rows_in, settings_of
from spap_jax.errors import UserError


def row(method: str, rise: float, seed: int = 0, **changes: Any) -> Row:
    found = Row("m", 0.3, method, seed, 4, 0, 2.0, 2.0 * math.exp(rise), 0.1, 1.0, "c", "d")
    return msgspec.structs.replace(found, **changes)


def test_a_run_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {"sparsity": (0.3,), "seed": (0,), "sequences": 4, "windows": 2, "output": tmp_path}
    main(method=("magnitude",), **asked)
    (first,) = rows_in(tmp_path / "results.jsonl", Row)
    assert first.perplexity > first.dense > 1
    assert first.divergence > 0
    measured = []
    monkeypatch.setattr(quality, "measured", lambda *_: measured.append(first) or row("wanda", 0.1))
    main(method=("magnitude", "wanda"), **asked)
    assert len(measured) == 1
    assert (tmp_path / "summary.png").stat().st_size > 1000


def test_what_cannot_be_run_is_refused_before_the_first_run(tmp_path: Path):
    for way in ("nonsense", "spap with nonsense=1", "spap with round_to=0"):
        with pytest.raises(UserError):
            main(method=("magnitude", way), output=tmp_path)
    with pytest.raises(UserError, match="models"):
        cases_of(tmp_path)
    assert not list(tmp_path.iterdir())


def test_settings_of_a_method():
    assert settings_of("obs + steps with round_to=8", 0.2, 3).round_to == 8
    assert settings_of("spap, low effort", 0.2, 3).effort == "low"


def test_the_ratio_is_to_the_best_peer_on_the_same_seed():
    rows = [row("obs", 0.4), row("fasp", 0.2), row("spap", 0.1), row("obs", 0.3, 1), row("spap", 0.3, 1)]
    assert ratio(rows, "m", 0.3, "spap") == pytest.approx((0.5 + 1) / 2)
    assert ratio([*rows, row("osscar", -0.1)], "m", 0.3, "spap") == math.inf
    assert ratio(rows[2:3], "m", 0.3, "spap") is None
    assert ratio(rows, "m", 0.2, "spap") is None


def test_the_page_shows_medians_in_order(tmp_path: Path):
    rows = [row("spap with rounds=3", 0.2), row("spap", 0.1), row("obs", 0.2), row("obs", 0.4, sparsity=0.5)]
    lines = [line.split(" | ") for line in markdown(rows, "python").splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines[2:]] == ["| obs", "| spap", "| spap with rounds=3"]
    assert lines[3][1:] == [f"{2 * math.exp(0.1):.4f} (0.50), 0.1000, 1", "- |"]
    draw(tmp_path / "picture.png", rows)


def test_the_page_in_the_repository_is_that_of_its_rows():
    folder = ROOT / "docs" / "quality"
    page = (folder / "README.md").read_text("utf-8")
    assert page == markdown(rows_in(folder / "results.jsonl", Row), page.split("```")[1].strip())


def test_the_commit_is_told():
    assert commit().removesuffix("-dirty").isalnum()
