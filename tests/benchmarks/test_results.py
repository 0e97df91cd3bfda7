"""Rows on disk are read back as they were written, and a torn line costs one row."""

from pathlib import Path

import pytest
from quality_rows import row

import spap_jax as spap
from benchmarks.quality.results import Results


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.csv"
    rows = [row(), row("spap, refit only", rise=1 / 3), row(seed=1, model='a "b", c')]
    written = Results(path)
    for each in rows:
        written.add(each)
    assert list(Results(path).rows.values()) == rows
    assert len(path.read_text().splitlines()) == 4


@pytest.mark.parametrize("cut", [1, 30, 100])
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "results.csv"
    for seed in range(3):
        Results(path).add(row(seed=seed))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = Results(path)
    assert [each.seed for each in again.rows.values()] == [0, 1]
    again.add(row(seed=2))
    assert path.read_bytes() == whole


def test_a_torn_header_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("model,spars")
    Results(path).add(row())
    assert list(Results(path).rows.values()) == [row()]


def test_what_is_no_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("model,perplexity\nllama,4\n")
    with pytest.raises(spap.UserError, match="other columns"):
        Results(path)
    path.unlink()
    Results(path).add(row())
    path.write_text(path.read_text() + "short,line\n")
    with pytest.raises(spap.UserError, match="line 3 is no row"):
        Results(path)


def test_without_a_file_rows_are_kept() -> None:
    results = Results()
    results.add(row())
    results.add(row(rise=0.02))  # replaces the row of the same run
    assert [each.rise for each in results.rows.values()] == [0.02]


@pytest.mark.parametrize(
    "changed", ["model", "method", "windows", "settings", "files", "seed", "sequences", "sparsity"]
)
def test_the_key_tells_runs_apart(changed: str) -> None:
    other = {"seed": 7, "sequences": 7, "sparsity": 0.7}.get(changed, "other")
    assert row().key != row(**{changed: other}).key


def test_the_key_does_not_see_the_outcome() -> None:
    assert row().key == row(rise=0.5, seconds=9.0, commit="other", date="later").key
