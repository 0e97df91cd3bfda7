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
from spap_jax.report.comparison import comparisons


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    found = run(tmp_path, report())
    assert (found.label, found.speed, found.pruned) == ("run", None, written())
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
    folders = [put(tmp_path / "new", tree), put(tmp_path / "plain")]
    with_more, plain = read.read_runs(folders)
    assert with_more.pruned == plain.pruned


def test_a_report_from_before_formats_had_numbers(tmp_path: Path) -> None:
    tree = report()
    del tree["format"]
    assert run(tmp_path, tree).pruned.model.name == "owner/model"


def test_numbers_that_were_not_finite(tmp_path: Path) -> None:
    tree = report()
    tree["layers"][1]["held_out"]["refit"] = tree["extras"]["perplexity"]["after"] = tree["joint"][0]["held_out"] = None
    found = run(tmp_path, tree).pruned
    assert found.layers[1].held_out is not None
    assert math.isnan(found.layers[1].held_out.refit)
    assert json.loads(found.to_json()) == tree


def without(*path: Any) -> Callable[[dict], None]:
    def change(tree: Any) -> None:
        for name in path[:-1]:
            tree = tree[name]
        del tree[path[-1]]

    return change


def setting(value: Any, *path: Any) -> Callable[[dict], None]:
    def change(tree: Any) -> None:
        for name in path[:-1]:
            tree = tree[name]
        tree[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without("layers"), "missing required field `layers`"),
        (without("layers", 1, "kept"), "missing required field `kept` - at `$.layers[1]`"),
        (without("model", "parameters"), "missing required field `parameters` - at `$.model`"),
        (setting([], "layers"), "length >= 1 - at `$.layers`"),
        (setting("many", "layers", 0, "swaps"), "Expected `int`, got `str` - at `$.layers[0].swaps`"),
        (setting(0, "model", "parameters", "before"), "Expected `int` >= 1"),
        (setting([3, 3], "layers", 0, "kept"), "do not ascend - at `$.layers[0]`"),
        (setting([3, 40], "layers", 2, "kept"), "Layer 2 keeps a channel that the model does not have"),
        (setting(2, "format"), "is a report of format 2 and this version reads format 1"),
        (setting("1", "format"), "is a report of format '1' and this version reads format 1"),
    ],
)
def test_reports_that_are_not_understood(change: Callable[[dict], None], expected: str, tmp_path: Path) -> None:
    tree = report()
    change(tree)
    with pytest.raises(UserError) as raised:
        run(tmp_path, tree)
    assert expected in str(raised.value)
    assert str(tmp_path / "run" / "spap_report.json") in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [b"", json.dumps(report()).encode()[:-500], b"[]", b"\xff\xfe", b"<html>", b'{"settings": ' + b"[" * 100_000],
    ids=["empty", "cut off", "a list", "not text", "not JSON", "too deep"],
)
def test_files_that_are_no_reports(content: bytes, tmp_path: Path) -> None:
    folder = put(tmp_path / "run")
    (folder / "spap_report.json").write_bytes(content)
    with pytest.raises(UserError, match=r"is cut off, or not what this version's spap prune writes") as raised:
        read.read_runs([folder])
    assert "\n" not in str(raised.value)


def test_folders(tmp_path: Path) -> None:
    folder = put(tmp_path / "run")
    for wrong in (tmp_path / "none", tmp_path, folder / "spap_report.json"):
        with pytest.raises(UserError, match=r"holds no spap_report\.json: name a folder that spap prune wrote"):
            read.read_runs([folder, wrong])
    with pytest.raises(UserError, match="are the same folder"):
        read.read_runs([folder, tmp_path / "." / "run"])


def test_labels_tell_the_runs_apart(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
    folders = [put(tmp_path / "a" / "run"), put(tmp_path / "b" / "run"), put(tmp_path / "b" / "other")]
    assert [each.label for each in read.read_runs(folders)] == ["a/run", "b/run", "b/other"]
    assert [each.label for each in read.read_runs(folders[1:])] == ["run", "other"]


def speeds(model: Path, **changes: Any) -> dict[str, Any]:
    """Return the JSON of ``spap bench``, with only the fields that are read."""
    return {
        "models": [{"model": "dense", "parameters": 1234567}, {"model": str(model), "parameters": 25000}],
        "workload": {"batch": 1, "prompt": 256, "new": 16, "repeats": 7},
        "speed_up": {"prefill": 1.25, "decode": 1.5},
        "by_arithmetic": {"prefill": 1.375, "decode": 1.625},
    } | changes


def test_measurements_of_speed(tmp_path: Path) -> None:
    folders = [put(tmp_path / "run"), put(tmp_path / "other")]
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(speeds(Path("other"))))
    found = read.read_runs(folders, [file])
    assert found[0].speed is None
    assert found[1].speed is not None
    assert found[1].speed.speed_up == schema.Ratios(1.25, 1.5)
    file.write_text(json.dumps(speeds(tmp_path / "elsewhere")))
    with pytest.raises(
        UserError, match=r"measures .*elsewhere of 25000 parameters, which is none of the folders given"
    ):
        read.read_runs(folders, [file])
    (tmp_path / "smaller").mkdir()
    file.write_text(json.dumps(speeds(Path("other"))))
    same = put(tmp_path / "smaller" / "other", report(keep=10))
    assert [bool(each.speed) for each in read.read_runs([folders[1], same], [file])] == [True, False]
    (same / read.REPORT).write_text(json.dumps(report()))
    with pytest.raises(UserError, match=r"which may be each of .*/other and .*/smaller/other: name one of them alone"):
        read.read_runs([folders[1], same], [file])
    file.write_text(json.dumps(speeds(Path("other"), models=[speeds(Path("run"))["models"][1]] * 2)))
    with pytest.raises(
        UserError, match=r"compares run with run of 25000 .* was pruned has 1234567: give spap bench that one first"
    ):
        read.read_runs(folders[:1], [file])
    file.write_text(json.dumps(speeds(Path("latest"))))
    (tmp_path / "latest").symlink_to("run")
    assert read.read_runs([tmp_path / "latest"], [file])[0].speed
    with pytest.raises(UserError, match="latest was measured in several of the files: name one of them"):
        read.read_runs([tmp_path / "latest"], [file, file])
    file.write_text(json.dumps(speeds(folders[0], models=[{"model": "run", "parameters": 25000}])))
    with pytest.raises(UserError, match=r"not what this version's spap bench DENSE PRUNED --json writes"):
        read.read_runs(folders, [file])
    with pytest.raises(UserError, match=r"none\.json cannot be read \(No such file or directory\)"):
        read.read_runs(folders, [tmp_path / "none.json"])


def test_speeds_of_different_work_are_on_lines_of_their_own(tmp_path: Path) -> None:
    folders, files = [put(tmp_path / "run"), put(tmp_path / "other")], [tmp_path / "1.json", tmp_path / "32.json"]
    for folder, file in zip(folders, files, strict=True):
        work = {"batch": int(file.stem), "prompt": 256, "new": 16, "repeats": 7}
        file.write_text(json.dumps(speeds(folder, workload=work)))
    said = {plot.name: plot for plot in comparisons(read.read_runs(folders, files))}["compare-decode"]
    (legend,) = said.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "batch 1, prompt 256, 16 new",
        "batch 32, prompt 256, 16 new",
    ]
