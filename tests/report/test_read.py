"""Reports are read as they are written, unknown fields are ignored, and invalid reports give an error in one line."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reports import put, report, run, written

from spap_jax.errors import UserError
from spap_jax.report import read, schema


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    found = run(tmp_path, report())
    assert (found.folder.name, found.speed, found.pruned) == ("run", None, written())
    assert found.pruned.model.widths.total == schema.Change(120, 75)


def test_a_folder_of_runs_stands_for_them(tmp_path: Path) -> None:
    """A folder with a report stands for itself, and so does one without any, so that the error names it."""
    names = ("sparsity-0.2", "sparsity-0.1", ".sparsity-0.3.resume")
    runs = [put(tmp_path / name) for name in names]
    (tmp_path / "plots").mkdir()
    assert read.with_sparsities([tmp_path]) == [runs[1], runs[0]]
    (tmp_path / read.REPORT).touch()
    assert read.with_sparsities([tmp_path, runs[0]]) == [tmp_path, runs[0]]
    assert read.with_sparsities([tmp_path / "plots"]) == [tmp_path / "plots"]


def test_fields_that_are_not_known_are_passed_by(tmp_path: Path) -> None:
    tree = report()
    for place in (tree, tree["model"], tree["layers"][0], tree["layers"][0]["calibration"], tree["joint"][0]):
        place["a new field"] = {"of": ["any", "kind"]}
    assert read.read_run(put(tmp_path / "new", tree)).pruned == read.read_run(put(tmp_path / "plain")).pruned


def test_numbers_that_were_not_finite(tmp_path: Path) -> None:
    tree = report()
    tree["layers"][1]["held_out"]["refit"] = tree["extras"]["perplexity"]["after"] = tree["joint"][0]["held_out"] = None
    found = run(tmp_path, tree).pruned
    assert found.layers[1].held_out is not None
    assert math.isnan(found.layers[1].held_out.refit)
    assert json.loads(found.to_json()) == tree


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tree: tree.pop("layers"), "missing required field `layers`"),
        (lambda tree: tree["layers"][0].update(swaps="many"), "Expected `int`, got `str` - at `$.layers[0].swaps`"),
        (lambda tree: tree["layers"][0].update(kept=[3, 3]), "do not ascend - at `$.layers[0]`"),
        (lambda tree: tree["layers"][2].update(kept=[3, 40]), "Layer 2 is not in the model, or keeps what"),
        (lambda tree: tree["layers"][2].update(layer=3), "Layer 3 is not in the model, or keeps what"),
        (lambda tree: tree.update(format=2), "is a report of format 2 and this version reads format 1"),
    ],
)
def test_reports_that_are_not_understood(change: Callable[[dict], object], expected: str, tmp_path: Path) -> None:
    tree = report()
    change(tree)
    with pytest.raises(UserError) as raised:
        run(tmp_path, tree)
    assert expected in str(raised.value)
    assert str(tmp_path / "run" / "spap_report.json") in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [json.dumps(report()).encode()[:-500], b"\xff\xfe", b'{"settings": ' + b"[" * 100_000],
    ids=["cut off", "not text", "too deep"],
)
def test_files_that_are_no_reports(content: bytes, tmp_path: Path) -> None:
    folder = put(tmp_path / "run")
    (folder / "spap_report.json").write_bytes(content)
    with pytest.raises(UserError, match="is cut off") as raised:
        read.read_run(folder)
    assert "\n" not in str(raised.value)


def test_folders(tmp_path: Path) -> None:
    folder = put(tmp_path / "run")
    for wrong in (tmp_path / "none", tmp_path, folder / "spap_report.json"):
        with pytest.raises(UserError, match=r"spap_report\.json"):
            read.read_run(wrong)


def test_speed_is_that_of_the_run_and_its_dense_model(tmp_path: Path) -> None:
    folder, file = put(tmp_path / "run"), tmp_path / "speed.json"
    ratios = {"prefill": 1.25, "decode": 1.5}
    speed: dict[str, Any] = {"workload": {}, "speed_up": ratios, "by_arithmetic": ratios}
    for sizes, fits in (((1234567, 25000), True), ((25000, 1234567), False), ((1234567, 25001), False)):
        models = [{"model": "m", "parameters": size} for size in sizes]
        file.write_text(json.dumps(speed | {"models": models}))
        if fits:
            found = read.read_run(folder, file).speed
            assert found is not None
            assert found.speed_up.decode == 1.5
        else:
            with pytest.raises(UserError, match="other models"):
                read.read_run(folder, file)
    for content in ("", "{}"):
        file.write_text(content)
        with pytest.raises(UserError, match="is cut off"):
            read.read_run(folder, file)
