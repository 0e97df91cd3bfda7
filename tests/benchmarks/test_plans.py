"""The page of plans matches what its command writes today."""

from pathlib import Path

from benchmarks.plans import ROOT, main


def test_the_page_is_up_to_date(tmp_path: Path):
    main(tmp_path / "plans.md")
    written = (ROOT / "docs" / "plans.md").read_text("utf-8")
    assert (tmp_path / "plans.md").read_text("utf-8") == written, "run python -m benchmarks.plans and commit the page"
