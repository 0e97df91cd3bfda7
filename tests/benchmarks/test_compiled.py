"""The table of compiled runs: what it says of a run that fits, of one that does not, and of one that is refused."""

import msgspec

from benchmarks.compiled import RUNS, Row, page, planned_of

PLANNED = {name: sum(parts.values()) for name, parts in planned_of(RUNS[0]).memory.items()}
FITS = Row(
    run=RUNS[0], together=32, room=14.4e9, needs={"streams": 0.7 * PLANNED["streams"], "joint steps": 13e9}, refused=[],
    programs=17, slowest="choose_channels", longest=26.2, seconds=77, commit="abc", compiler="0.1",
)  # fmt: skip


def test_each_run_is_a_line():
    rows = [
        FITS,
        msgspec.structs.replace(FITS, run=RUNS[-1], needs={"joint steps": 15e9}),
        msgspec.structs.replace(FITS, together=0, refused=["step (joint steps)"]),
    ]
    lines = [line for line in page(rows).splitlines() if "| llama" in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "llama-3.1-8b", "v5e-8", "default", "", "32", "joint steps", "13", f"{PLANNED['joint steps'] / 1e9:.3g}",
        "14.4", "yes", "streams -30%", "26 s, choose_channels",
    ]  # fmt: skip
    assert cells[1][3] == "`--schedule parallel --model-devices 8`"
    assert [each[9] for each in cells] == ["yes", "no", "no"]
    assert cells[2][4] == ""
    assert len(set(RUNS)) == len(RUNS)
