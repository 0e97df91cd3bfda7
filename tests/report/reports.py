"""Reports as ``spap prune`` writes them, with distinguishable numbers, and a parser of pages."""

import inspect
import json
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from spap_jax.report.read import RunReports, read_run
from spap_jax.report.schema import (
    AttentionReport,
    Biases,
    Change,
    Check,
    DataAccount,
    Errors,
    Extras,
    LayerReport,
    MethodAccount,
    Perplexities,
    PrunedModel,
    PruneReport,
    Sparsities,
    Sparsity,
    Widths,
)

DASH = "\N{EN DASH}"


def layer(index: int, width: int, keep: int, held_out: bool) -> LayerReport:
    draw = np.random.default_rng(index)
    kept = tuple(sorted(int(c) for c in draw.choice(width, keep, replace=False)))
    calibration, other = (Errors(*sorted(map(float, draw.random(3)), reverse=True)) for _ in range(2))
    swaps, improving, rounds = (int(count) for count in draw.integers(1, 90, 3))
    return LayerReport(
        layer=index,
        kept=kept,
        calibration=calibration,
        held_out=other if held_out else None,
        swaps=swaps,
        improving_swaps=improving,
        ridge=1e-4,
        rounds=rounds,
        seconds={"selection": float(draw.random()), "refit": float(draw.random())},
    )


def check(number: int) -> Check:
    taken = number % 3 != 1
    losses = (0.9, 0.8) if number else ()
    return Check(2 * number, 2000 * number, losses, 0.88 - 0.01 * number if taken else 0.95, taken, 2.5, 0.75)


def written(layers: int = 3, checks: int = 6, held_out: bool = True, width: int = 40, keep: int = 25) -> PruneReport:
    return PruneReport(
        settings={
            "sparsity": 1 - keep / width,
            "round_to": 1,
            "method": "spap",
            "joint_passes": None,
            "rounds": 2,
        },
        method=MethodAccount("spap", "alternate"),
        model=PrunedModel(
            name="owner/model",
            architecture="LlamaForCausalLM",
            layers=layers,
            intermediate=Change(width, keep),
            widths=Widths((width,) * layers, (keep,) * layers),
            heads=Change(8, 8),
            kv_heads=Change(2, 2),
            mlp_bias=Biases(False, False),
            parameters=Change(1234567, 1000 * keep),
            mlp_parameters=Change(765432, 100 * keep),
        ),
        sparsity=Sparsities(Sparsity(1 - keep / width, 1 - keep / width), Sparsity(0.0, 0.0)),
        calibration=DataAccount(17, 64, "some text", "ab" * 32),
        versions={"spap-jax": "0.1.0", "jax": "0.10.2"},
        layers=tuple(layer(index, width, keep, held_out) for index in range(layers)),
        joint=tuple(map(check, range(checks))),
        extras=Extras(
            bytes=Change(4938268, 4000 * keep),
            perplexity=Perplexities("other text", 7.125, 9.5 - keep / width),
            peak_memory_bytes=987654321,
        ),
    )


def report(**changes: Any) -> dict[str, Any]:
    """Return the JSON of ``written``, with its arguments and top-level fields as given."""
    shape = {name: changes.pop(name) for name in inspect.signature(written).parameters if name in changes}
    return json.loads(written(**shape).to_json()) | changes


def with_fewer_heads(tree: dict[str, Any]) -> dict[str, Any]:
    """Change a report to that of a run that removed one of two key/value heads, so four of eight heads, per layer."""
    tree["sparsity"]["heads"] = {"asked": 0.5, "achieved": 0.5}
    tree["model"] |= {"heads": {"before": 8, "after": 4}, "kv_heads": {"before": 2, "after": 1}}
    calibration, held_out = Errors(0.5, 0.25, 0.25), Errors(0.6, 0.3, 0.3)
    for layer in tree["layers"]:
        layer["attention"] = asdict(AttentionReport((1,), calibration, held_out, 0, 0, 1e-4))
    return tree


def put(folder: Path, tree: dict[str, Any] | None = None) -> Path:
    """Create a folder with a report, and return it."""
    folder.mkdir()
    (folder / "spap_report.json").write_text(json.dumps(report() if tree is None else tree))
    return folder


def run(tmp_path: Path, tree: dict[str, Any] | None = None) -> RunReports:
    return read_run(put(tmp_path / "run", tree))


def pruned(tmp_path: Path, tree: dict[str, Any] | None = None) -> PruneReport:
    return run(tmp_path, tree).pruned


class Look(HTMLParser):
    """A parsed page: tags with their attributes, tables as lists of rows of cells, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self._inside = tag if tag in ("style", "td", "th") else self._inside

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data: str) -> None:
        self.text += data if self._inside != "style" else ""
        if self._inside in ("td", "th"):
            self.tables[-1][-1][-1] += data
