"""The figures show the numbers of the report."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from reports import pruned, report, with_fewer_heads

from spap_jax.report import figures
from spap_jax.report.schema import LayerReport, PruneReport


def by_name(found: PruneReport) -> dict[str, figures.Plot]:
    return dict(zip(("errors", *("losses",) * (len(found.joint) > 1), "channels"), figures.plots(found), strict=True))


def lines(axes: Axes) -> list[tuple[list[float], list[float]]]:
    return [(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()) for line in axes.get_lines()]


def test_errors(tmp_path: Path) -> None:
    tree = report()
    plot = by_name(pruned(tmp_path, tree))["errors"]
    stages = ("selection", "refit", "alternating")
    expected = [
        [100 * layer[tokens][stage] for layer in tree["layers"]]
        for stage in stages
        for tokens in ("calibration", "held_out")
    ]
    assert [y for _, y in lines(plot.figure.axes[0])] == [*expected, []]  # the last is for the legend alone
    worst = max(range(3), key=lambda index: expected[-1][index])
    assert f"{expected[-1][worst]:.2f} (layer {worst})" in plot.alt


def test_channels(tmp_path: Path) -> None:
    tree = report()
    [picture] = by_name(pruned(tmp_path, tree))["channels"].figure.axes
    shown = np.asarray(picture.get_images()[0].get_array())
    for row, layer in zip(shown, tree["layers"], strict=True):
        assert np.flatnonzero(row).tolist() == layer["kept"]


def test_dropped_blocks_have_a_row(tmp_path: Path) -> None:
    tree = report(layers=2)
    tree["model"]["layers"] = 4
    tree["layers"][1]["layer"] = 3
    plot = by_name(pruned(tmp_path, tree))["channels"]
    shown = np.asarray(plot.figure.axes[0].get_images()[0].get_array())
    assert np.flatnonzero(shown.any(axis=1)).tolist() == [0, 3]
    assert plot.alt.endswith("Dropped blocks: 1, 2.")


def test_heads(tmp_path: Path) -> None:
    plot = figures.plots(pruned(tmp_path, with_fewer_heads(report())))[-1]
    assert "key/value heads" in plot.title
    assert np.asarray(plot.figure.axes[0].get_images()[0].get_array()).tolist() == [[0, 1]] * 3


@pytest.mark.parametrize(("width", "size"), [(512, 1), (1025, 3)])
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
    assert "kept, here those of step 10. It went from 0.8800 to 0.8300 nats per token" in plot.caption


def test_losses_on_the_text_that_was_fitted_are_not_called_held_out(tmp_path: Path) -> None:
    plot = by_name(pruned(tmp_path, report(held_out=False)))["losses"]
    assert "The weights with the lowest divergence on calibration tokens are kept" in plot.caption


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
    found = by_name(pruned(tmp_path, tree))
    assert np.isnan(lines(found["errors"].figure.axes[0])[-2][1]).all()
    assert "adjusted not finite" in found["errors"].alt


def test_many_layers_and_checks_fit(tmp_path: Path) -> None:
    """Warnings are errors, including those about labels without room."""
    found = by_name(pruned(tmp_path, report(layers=80, checks=300, width=4000, keep=3001)))
    assert all(b"</svg>" in plot.svg() for plot in found.values())
    for plot in found.values():
        plot.figure.draw_without_rendering()
        heights = [axes.yaxis.label.get_window_extent().intervaly for axes in plot.figure.axes]
        assert all(plot.figure.bbox.y0 <= low <= high <= plot.figure.bbox.y1 for low, high in heights), plot.title
    assert "A cell is 8 of them" in found["channels"].caption
