"""The figures show the numbers of the report."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import same_color
from reports import pruned, put, report

from spap_jax.report import comparison, draw, figures, tables
from spap_jax.report.read import read_runs
from spap_jax.report.schema import LayerReport, PruneReport
from spap_jax.report.style import LIGHT, themed


def by_name(found: PruneReport) -> dict[str, figures.Plot]:
    with draw.drawing():
        return {plot.name: plot for plot in figures.plots(found)}


def lines(axes: Axes) -> list[tuple[list[float], list[float]]]:
    return [(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()) for line in axes.get_lines()]


def bars(axes: Axes, side: str) -> list[float]:
    return [getattr(patch, f"get_{side}")() for patch in axes.patches]


def test_errors(tmp_path: Path) -> None:
    tree = report()
    plot = by_name(pruned(tmp_path, tree))["errors"]
    stages = ("selection", "refit", "alternating")
    expected = [
        [100 * layer[tokens][stage] for layer in tree["layers"]]
        for stage in stages
        for tokens in ("calibration", "held_out")
    ]
    assert [y for _, y in lines(plot.figure.axes[0])] == expected
    worst = max(range(3), key=lambda index: expected[-1][index])
    assert f"{expected[-1][worst]:.2f} (layer {worst})" in plot.alt


def test_gains_are_shares_of_the_held_out_error_after_selection(tmp_path: Path) -> None:
    tree = report()
    axes = by_name(pruned(tmp_path, tree))["gains"].figure.axes[0]
    errors = np.array([list(layer["held_out"].values()) for layer in tree["layers"]])
    expected = 100 * -np.diff(errors, axis=1) / errors[:, :1]
    assert bars(axes, "height") == pytest.approx(expected.T.ravel().tolist())


def test_channels(tmp_path: Path) -> None:
    tree = report()
    picture, counts = by_name(pruned(tmp_path, tree))["channels"].figure.axes
    shown = np.asarray(picture.get_images()[0].get_array())
    for row, layer in zip(shown, tree["layers"], strict=True):
        assert np.flatnonzero(row[:, 3]).tolist() == layer["kept"]
    assert bars(counts, "width") == [25, 25, 25]


@pytest.mark.parametrize(("width", "size"), [(40, 1), (512, 1), (1000, 2), (1025, 3)])
def test_cells_of_several_channels(width: int, size: int) -> None:
    kept = tuple(range(0, width, 3))
    errors: Any = None
    share = figures.kept_share(LayerReport(0, kept, errors, None, 0, 0, 1e-4, 0, {}), width, size)
    inside = np.isin(np.arange(width), kept)
    assert share == pytest.approx([inside[start : start + size].mean() for start in range(0, width, size)])


def test_losses(tmp_path: Path) -> None:
    tree = report()
    plot = by_name(pruned(tmp_path, tree))["losses"]
    each, path, taken, refused = lines(plot.figure.axes[0])
    checks = tree["joint"]
    assert each == ([*range(1, 11)], [0.9, 0.8] * 5)
    assert path == ([0, 2, 4, 6, 8, 10], [check["held_out"] for check in checks])
    assert taken == ([0, 4, 6, 10], [checks[place]["held_out"] for place in (0, 2, 3, 5)])
    assert refused == ([2, 8], [0.95, 0.95])
    assert "kept, here those of step 10. The loss went from 0.8800 to 0.8300 nats per token" in plot.caption


def test_losses_on_the_text_that_was_fitted_are_not_called_held_out(tmp_path: Path) -> None:
    report_of = pruned(tmp_path, report(held_out=False))
    plot = by_name(report_of)["losses"]
    assert "The weights with the lowest loss on calibration tokens are kept" in plot.caption
    table = tables.joint(report_of)
    assert "calibration" in table.columns
    assert "on calibration tokens" in table.note


def test_seconds(tmp_path: Path) -> None:
    tree = report()
    axes = by_name(pruned(tmp_path, tree))["seconds"].figure.axes[0]
    assert bars(axes, "width") == list(tree["seconds"].values())
    assert [text.get_text() for text in axes.texts] == [f"{spent:.1f}" for spent in tree["seconds"].values()]


def test_plots_without_data_are_left_out(tmp_path: Path) -> None:
    tree = report(layers=1, checks=0, held_out=False)
    tree["layers"][0]["seconds"] = {}
    errors = tree["layers"][0]["calibration"]
    errors["refit"] = errors["alternating"] = errors["selection"]
    found = by_name(pruned(tmp_path, tree))
    assert list(found) == ["errors", "channels"]
    assert len(lines(found["errors"].figure.axes[0])) == 1
    assert "on calibration tokens" in found["errors"].alt


def test_what_was_not_finite_is_a_gap(tmp_path: Path) -> None:
    tree = report()
    for layer in tree["layers"]:
        layer["held_out"]["alternating"] = None
    tree["layers"][0]["held_out"]["selection"] = 0.0  # so nothing to gain
    found = by_name(pruned(tmp_path, tree))
    assert np.isnan(lines(found["errors"].figure.axes[0])[-1][1]).all()
    assert "adjusted not finite" in found["errors"].alt
    assert np.isnan(bars(found["gains"].figure.axes[0], "height")[0])


def test_many_layers_and_checks_fit(tmp_path: Path) -> None:
    """Warnings are errors, including those about labels without room."""
    found = by_name(pruned(tmp_path, report(layers=80, checks=300, width=4000, keep=3001)))
    drawn = {name: draw.png(plot.figure) for name, plot in found.items()}
    assert all(png.startswith(b"\x89PNG") for png in drawn.values())
    for plot in found.values():
        plot.figure.draw_without_rendering()
        heights = [axes.yaxis.label.get_window_extent().intervaly for axes in plot.figure.axes]
        assert all(plot.figure.bbox.y0 <= low <= high <= plot.figure.bbox.y1 for low, high in heights), plot.name
    assert "a cell is 8 channels" in found["channels"].caption


def test_colours_follow_the_page(tmp_path: Path) -> None:
    assert len(set(LIGHT.values())) == len(LIGHT)
    with draw.drawing():
        text = draw.svg(by_name(pruned(tmp_path))["errors"].figure, "x")
    assert all(f"var(--{name})" in text for name in ("ink", "muted", "grid", "grey", "blue", "orange"))
    assert not [colour for colour in LIGHT.values() if colour in text]
    assert themed(f"fill: {LIGHT['blue']}") == "fill: var(--blue)"
    assert "#000000" not in text


def test_comparisons(tmp_path: Path) -> None:
    trees = [report(keep=30), report(keep=20), report(keep=10)]
    trees[2]["method"]["selection"] = "wanda"
    del trees[1]["extras"]["perplexity"]
    runs = read_runs([put(tmp_path / name, tree) for name, tree in zip("abc", trees, strict=True)])
    with draw.drawing():
        found = {plot.name: plot for plot in comparison.comparisons(runs)}
    assert list(found) == ["compare-perplexity", "compare-parameters", "compare-bytes"]
    assert lines(found["compare-perplexity"].figure.axes[0]) == [([0, 25], [7.125, 8.75]), ([0, 75], [7.125, 9.25])]
    assert lines(found["compare-parameters"].figure.axes[0])[0] == ([0, 0, 25, 50], [1.234567, 1.234567, 0.03, 0.02])
    (legend,) = found["compare-perplexity"].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["spap", "wanda"]
    first, second = found["compare-perplexity"].figure.axes[0].get_lines()
    assert not same_color(first.get_color(), second.get_color())
    assert found["compare-perplexity"].alt.endswith("a 8.7500, c 9.2500.")


def test_runs_of_different_effort_are_lines_of_their_own(tmp_path: Path) -> None:
    trees = {effort: report(keep=30) for effort in ("low", "high")}
    for effort, tree in trees.items():
        tree["settings"]["effort"] = effort
    runs = read_runs([put(tmp_path / name, tree) for name, tree in trees.items()])
    with draw.drawing():
        (legend,) = next(iter(comparison.comparisons(runs))).figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["effort low", "effort high"]
