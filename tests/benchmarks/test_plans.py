"""The page of plans matches what its command writes today."""

from benchmarks.plans import MODELS, ROOT, part


def test_the_page_is_up_to_date():
    """The default effort of the smallest model stands for all, since every plan of a mesh traces its programs."""
    written = (ROOT / "docs" / "plans.md").read_text("utf-8")
    assert part(MODELS[0], "effort default") in written, "run python -m benchmarks.plans and commit the page"
