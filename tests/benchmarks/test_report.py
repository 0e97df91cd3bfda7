"""The Markdown report and the plots show what was measured and what is missing, and no other numbers."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from quality_rows import row, scope

from benchmarks.quality import ablation
from benchmarks.quality.__main__ import write_report
from benchmarks.quality.judge import Judge
from benchmarks.quality.methods import ALL, PEERS, settings_hash, settings_of
from benchmarks.quality.plots import draw, effort_points, efforts, ratios
from benchmarks.quality.report import markdown
from benchmarks.quality.results import Row

COMPLETE = [row(peer, 0.2, seed) for peer in PEERS for seed in range(3)] + [
    row(rise=0.08, seed=seed) for seed in range(3)
]


def line(text: str, start: str) -> str:
    return next(each for each in text.splitlines() if each.startswith(start))


def test_the_tables() -> None:
    text = markdown(COMPLETE, scope(methods=(*PEERS, "spap"), sparsities=(0.2, 0.3)))
    assert "python -m benchmarks.quality --zoo zoo" in text
    assert "`0123456789ab`" in text
    assert "2026-01-02T03:04:05+00:00" in text
    assert "Runs: 24 of 48." in text
    assert "262 144" in text
    assert "Dense perplexity 4.0000 on 51 200 evaluation tokens. Channels kept in every layer: 30%: 224." in text
    assert line(text, "| spap | llama-stories | 30%") == (
        "| spap | llama-stories | 30% | random | 0.400 | 0.400 to 0.400 | <= 0.45 | met | - |"
    )
    assert line(text, "| spap | llama-stories | 20%") == "| spap | llama-stories | 20% | - | - | - | <= 0.45 | - | - |"
    assert "spap: target met in 1 of 2 cases, and so far in 0 of 1 that lack runs." in text
    assert "| spap | - | 4.0800 (0.0800; 0.40) |" in text.splitlines()
    assert "| spap | - | 0.0400 |" in text.splitlines()
    assert "| obs | - | 4.2000 (0.2000; 1.00) |" in text.splitlines()


def test_what_is_missing_is_said() -> None:
    text = markdown([row("obs", 0.2, 0), row("spap", 0.05, 0), row("spap", 0.06, 1)], scope())
    assert line(text, "| fasp |") == "| fasp | - |"
    assert line(text, "| obs |") == "| obs | 4.2000 [1 of 3 seeds] (0.2000; 1.00 [1 of 3 seeds]) |"
    assert "met so far (1 of 7 peers, 1 of 3 seeds)" in text
    assert "target met in 0 of 1 cases, and so far in 1 of 1 that lack runs." in text
    assert "No runs." in markdown([], scope())
    assert "None of the methods that have targets" in markdown([row("obs")], scope(methods=("obs",)))


def test_commits_are_all_named_and_no_rise_is_no_denominator() -> None:
    text = markdown([row("obs", -0.01), row("spap", 0.01, commit="fedcba987654-dirty")], scope(seeds=(0,)))
    assert "`0123456789ab`, `fedcba987654-dirty`" in text
    assert "several commits" in text
    assert "| spap | 4.0100 (0.0100; ∞) |" in text.splitlines()


def every_method() -> list[Row]:
    return [
        row(method, 0.01 * (place + 1) * (1 + 0.1 * seed) - 0.02 * (cut == 0.1), seed, sparsity=cut)
        for place, method in enumerate(ALL)
        for seed in range(3)
        for cut in (0.1, 0.3)
    ]


def test_the_plots(tmp_path: Path) -> None:
    names = draw(tmp_path, every_method(), scope(methods=ALL, sparsities=(0.1, 0.3), models=("llama-stories", "none")))
    assert names == ["llama-stories.png", "summary.png", "effort.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    text = markdown(every_method(), scope(methods=ALL), names)
    assert "![llama-stories.png](llama-stories.png)" in text
    assert "![summary.png](summary.png)" in text
    assert "![effort.png](effort.png)" in text


def test_a_method_hides_no_other_that_is_as_good() -> None:
    tied = ("obs + steps", "spap")
    rows = [row("obs", 0.2), *(row(method, 0.1) for method in tied)]
    axes = ratios(Figure(), Judge(rows), scope(methods=("obs", *tied), seeds=(0,))).axes[0]
    bars = [each for each in axes.containers if isinstance(each, ErrorbarContainer)]
    drawn = {each.get_label(): np.asarray(each.lines[0].get_xydata(), float) for each in bars}
    apart = np.abs(drawn["spap"] - drawn["obs + steps"])
    assert apart.shape == (1, 2)
    assert apart[0, 0] > 1  # percentage points
    assert apart[0, 1] == 0


def test_the_gain_by_calibration_tokens() -> None:
    settings = {method: settings_hash(settings_of(method, 0.3, 0)) for method in ("spap", "obs", "fasp")}
    rises = {(256, "spap"): 0.05, (256, "obs"): 0.1, (1024, "spap"): 0.02, (1024, "fasp"): 0.08, (1024, "obs"): 0.09}
    rows = [
        row(method, rise, settings=settings[method], sequences=count, calibration_tokens=256 * count)
        for (count, method), rise in rises.items()
    ]
    text = ablation.markdown(rows)
    assert text is not None
    assert "## Settings" not in text
    assert [line for line in text.splitlines() if line.startswith("| llama-stories")] == [
        "| llama-stories | 30% | 0 | 65536 | spap | 0.0500 | obs | 0.500 |",
        "| llama-stories | 30% | 0 | 262144 | spap | 0.0200 | fasp | 0.250 |",
    ]
    assert ablation.markdown(rows[2:]) is None  # a single amount of tokens shows no trend


def test_a_scope_grows_by_what_was_run() -> None:
    grown = scope(methods=("spap",), seeds=(0,)).with_rows(
        [row("osscar", seed=2), row("obs", model="opt-stories", sparsity=0.1), row("spap with ridge=0.1")]
    )
    assert grown == scope(
        models=("llama-stories", "opt-stories"),
        cells=((0.3, "spap"), (0.3, "osscar"), (0.1, "obs"), (0.3, "spap with ridge=0.1")),
        seeds=(0, 2),
    )
    assert grown.sparsities == (0.1, 0.3)
    assert grown.methods == ("obs", "osscar", "spap", "spap with ridge=0.1")


def test_what_an_effort_takes_and_gives(tmp_path: Path) -> None:
    rows = [
        row("obs", 0.1),
        row("spap", 0.04, processor_seconds=20.0),
        row("spap, high effort", 0.02, processor_seconds=90.0),
        row("spap, low effort", 0.08, processor_seconds=math.nan),  # not measured
    ]
    one = scope(methods=ALL, seeds=(0,))
    (points,) = effort_points(Judge(rows), one).values()
    assert [place for place, _, _ in points] == [20.0, 90.0]
    assert [ratio for _, ratio, _ in points] == pytest.approx([0.4, 0.2])
    assert [name for _, _, name in points] == ["default", "high"]
    assert "effort.png" not in draw(tmp_path, rows[:2], one)  # a single point makes no curve


def test_the_picture_of_efforts_leaves_no_model_out() -> None:
    names = tuple(f"model-{number}" for number in range(5))
    rows = [
        row(method, rise, model=name, processor_seconds=seconds)
        for name in names
        for method, rise, seconds in (("obs", 0.1, 9.0), ("spap", 0.04, 20.0), ("spap, high effort", 0.02, 90.0))
    ]
    figure = efforts(Figure(), Judge(rows), scope(methods=ALL, models=names, seeds=(0,)))
    assert figure.axes[0].get_legend_handles_labels()[1][:5] == list(names)


def test_without_matplotlib_there_is_a_sentence_and_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_report(tmp_path, COMPLETE, scope())
    assert "pip install -e '.[bench]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "| spap |" in text
    assert ".png" not in text


def test_what_single_settings_change() -> None:
    changed = "spap with rounds=0"
    todays = {name: settings_hash(settings_of(name, 0.3, 0)) for name in ("spap", changed, "obs")}
    rises = (("spap", 0.02), (changed, 0.03), ("obs", 0.1))
    rows = [row(name, rise, settings=todays[name], teraflops=50 * rise) for name, rise in rises]
    text = ablation.markdown(rows)
    assert text is not None
    assert [each for each in text.splitlines() if each.startswith("| llama")] == [
        "| llama-stories | 30% | 0 | spap | `rounds=0` | 0.0300 | 1.500 | 0.0150 | 1.500 | 1.50 | 2 |"
    ]
    uncounted = ablation.markdown([replace(rows[0], teraflops=math.nan), *rows[1:]])
    assert uncounted is not None
    assert "| 1.500 | - | 2 |" in uncounted
    assert "--sequences" not in text
    fewer = ablation.markdown([replace(each, sequences=256, windows="160") for each in rows])
    assert fewer is not None
    assert "- llama-stories: with `--sequences 256 --windows 160`, and its texts" in fewer
    both = "spap with rounds=0+ridge=0.001"
    joined = ablation.markdown([rows[0], row(both, 0.04, settings=settings_hash(settings_of(both, 0.3, 0)))])
    assert joined is not None
    assert "| spap | `rounds=0+ridge=0.001` | 0.0400 | 2.000 |" in joined
    assert ablation.markdown([rows[0], rows[2]]) is None  # nothing was changed
    assert ablation.markdown(rows[1:]) is None  # nothing to compare with
    assert ablation.markdown([rows[0], row(changed, 0.03, settings="other")]) is None  # measured with other settings
    assert ablation.markdown([rows[0], row("spap with speed=1", 0.03)]) is None
    others = [replace(rows[0], **other) for other in ({"sequences": 64}, {"windows": "9"}, {"files": "cccc"})]
    assert ablation.markdown([*others, *rows[1:]]) is None  # other tokens or texts


def test_a_change_is_measured_without_it_and_over_seeds() -> None:
    names = ("spap", "spap with rounds=0", "spap with rounds=0 ridge=0.001")
    rises = [(0.02, 0.03, 0.06), (0.02, 0.05, 0.05), (0.1, 0.1, 0.3)]
    rows = [
        row(name, rise, seed, settings=settings_hash(settings_of(name, 0.3, seed)))
        for seed, of_seed in enumerate(rises)
        for name, rise in zip(names, of_seed, strict=True)
    ]
    text = ablation.markdown(rows)
    assert text is not None
    case = "| llama-stories | 30% | 0, 1, 2 |"
    assert [each for each in text.splitlines() if each.startswith("| llama")] == [
        f"{case} spap | `rounds=0` | 0.0500 | 1.500 | 0.0250 | 1.500 | 1.00 | 2 |",
        f"{case} spap with rounds=0 | `ridge=0.001` | 0.0600 | 2.000 | 0.0300 | 2.000 | 1.00 | 2 |",
    ]
