"""The page is self-contained, shows the report's numbers, and never executes the content of a name."""

import re
from pathlib import Path
from typing import Any

import pytest
from reports import DASH, Look, put, report, run, with_fewer_heads

from spap_jax.report.card import model_card
from spap_jax.report.figures import plots
from spap_jax.report.page import render, side_by_side
from spap_jax.report.read import RunReports, read_run
from spap_jax.report.schema import (
    Check,
    DataAccount,
    Extras,
    FinetuneReport,
    GenerationWorkload,
    Measured,
    Perplexities,
    Ratios,
    SpeedReport,
)


def page(found: RunReports) -> str:
    return render(found, plots(found.pruned))


def page_of(tmp_path: Path, tree: dict[str, Any]) -> str:
    """Return the page of a report, without plots."""
    return render(run(tmp_path, tree), [])


def test_nothing_is_fetched_and_pictures_have_words(tmp_path: Path) -> None:
    look = Look(page(run(tmp_path)))
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in look.tags}
    links = [a[name] for _, a in look.tags for name in ("src", "href", "srcset", "action") if name in a]
    assert [link[:26] for link in links] == ["data:image/svg+xml;base64,"] * 3
    assert all(len(attributes["alt"]) > 20 for tag, attributes in look.tags if tag == "img")
    policy = next(a["content"] for tag, a in look.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")


def test_the_numbers_of_a_run(tmp_path: Path) -> None:
    tree = report(advice=["more text would help"])
    text = page_of(tmp_path, tree)
    look = Look(text)
    before, layers = look.tables
    assert before == [
        ["", "before", "after", "change"],
        ["parameters", "1 234 567", "25 000", "-98.0 %"],
        ["MLP parameters", "765 432", "2 500", "-99.7 %"],
        ["MLP channels, all layers", "120", "75", "-37.5 %"],
        ["weights on disk", "4.94 MB", "100 kB", "-98.0 %"],
        ["divergence (nats), held-out tokens", "0", "0.8300", ""],
        ["same top token, held-out tokens", "100 %", "75 %", ""],
        ["perplexity", "7.1250", "8.8750", "+24.6 %"],
    ]
    for row, layer in zip(layers[1:], tree["layers"], strict=True):
        errors = [f"{100 * value:.2f}" for tokens in ("calibration", "held_out") for value in layer[tokens].values()]
        counts = [str(layer[name]) for name in ("swaps", "improving_swaps", "rounds")]
        assert row == [str(layer["layer"]), "25", *errors, *counts, f"{sum(layer['seconds'].values()):.1f}"]
    assert "Every layer keeps 25 of 40 MLP channels." in look.text
    some = ("owner/model", "LlamaForCausalLM", "some text (17 sequences of 64 tokens)", "other text", "988 MB")
    assert all(shown in look.text for shown in (*some, "more text would help", f"{sum(tree['seconds'].values()):.1f}:"))
    pairs = re.findall(r"<div><dt>([^<]*)</dt><dd>([^<]*)</dd></div>", text)
    assert pairs[0] == ("sparsity", "0.375")
    assert ("joint_passes", DASH) in pairs
    assert pairs[-1] == ("jax", "0.10.2")


def test_it_begins_with_the_result(tmp_path: Path) -> None:
    text = page(run(tmp_path))
    parts = ("<h1>model, 37.5&nbsp;% of the MLP channels removed</h1>", '<dl class="headlines">', "<figure",
             "Before and after", "<summary>Every layer in numbers", "Calibration", "Settings", "Versions")  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert re.findall(r'<div><dt>(.*?)</dt><dd>(.*?)</dd><dd class="detail">(.*?)</dd></div>', text) == [
        ("Divergence (nats)", "0.8300", "0 → 0.8300"),
        ("Perplexity", "+24.6 %", "7.1250 → 8.8750"),
        ("Weights on disk", "-98.0 %", "4.94 MB → 100 kB"),
        ("Parameters", "-98.0 %", "1 234 567 → 25 000"),
    ]


def test_the_divergence_is_that_of_the_weights_that_were_kept(tmp_path: Path) -> None:
    found = run(tmp_path, report(checks=5))  # of which the last was not taken
    rows = {row[0].partition(",")[0]: row for row in Look(render(found, [])).tables[0]}
    assert rows["divergence (nats)"][2] == "0.8500"
    assert "| 0.8500 |" in model_card(found.pruned)


@pytest.mark.parametrize(("weight", "said"), [(0.0, False), (0.5, True)])
def test_a_run_that_learnt_the_text_says_so(weight: float, said: bool, tmp_path: Path) -> None:
    tree = report()
    tree["settings"]["joint_text_weight"] = weight
    found = run(tmp_path, tree)
    for text in (Look(render(found, [])).text, model_card(found.pruned)):
        assert bool(re.search("(?i)adapted (it )?to the", text)) == said


def test_what_a_run_lacks_is_not_there(tmp_path: Path) -> None:
    tree = report(checks=0, held_out=False, extras={})
    tree["calibration"]["sha256"] = None
    look = Look(page(run(tmp_path, tree)))
    before, layers = look.tables
    assert [row[0] for row in before] == ["", "parameters", "MLP parameters", "MLP channels, all layers"]
    assert not [name for name in layers[0] if "held-out" in name]
    assert not re.search("None|nan|SHA-256|measured on|Peak memory|joint steps", look.text)


@pytest.mark.parametrize("name", ["models/model/", "owner/model"])
def test_the_title_is_a_name(name: str, tmp_path: Path) -> None:
    tree = report(checks=0)
    tree["model"]["name"] = name
    assert "<title>model, 37.5 % of the MLP channels removed</title>" in page_of(tmp_path, tree)


def test_heads_that_were_removed(tmp_path: Path) -> None:
    text = page_of(tmp_path, with_fewer_heads(report(checks=0)))
    assert "<title>model, 37.5 % of the MLP channels and 50 % of the attention heads removed</title>" in text
    before, layers = Look(text).tables
    assert ["key/value heads of a layer", "2", "1", "-50.0 %"] in before
    cells = dict(zip(layers[0], layers[1], strict=True))
    assert cells["key/value heads kept"] == "1"
    assert (cells["attention chosen"], cells["attention held-out refit"]) == ("50.00", "30.00")


def test_a_perplexity_that_was_not_finite(tmp_path: Path) -> None:
    tree = report()
    tree["extras"]["perplexity"]["after"] = None
    assert Look(page_of(tmp_path, tree)).tables[0][-1] == ["perplexity", "7.1250", "not finite", "-"]


def test_training_and_speed_that_came_later(tmp_path: Path) -> None:
    """The report is that of the pruning, so without a note its numbers would be taken for the trained model's."""
    trained = FinetuneReport(
        settings={}, model="pruned", teacher=None, objective="next token", data=DataAccount(1, 8, "text", None),
        trained_parameters=7, checks=(Check(0, 0, (), 2.5, True, 0.1), Check(1234, 9872, (2.5,), 2.25, True, 0.1)),
        versions={}, seconds=1.0, extras=Extras(perplexity=Perplexities("a third text", 8.75, 7.5)),
    )  # fmt: skip
    models = (Measured("dense", 1234567), Measured("pruned", 25000))
    speed = SpeedReport(models, GenerationWorkload(1, 256, 16, 7), Ratios(1.25, 1.5), Ratios(1.375, 1.625))
    look = Look(render(RunReports(tmp_path, run(tmp_path).pruned, trained, speed), []))
    assert "Trained since, for 1 234 steps (next token); its perplexity is of a third text." in look.text
    assert ["perplexity by training", "8.7500", "7.5000", "-14.3 %"] in look.tables[0]
    assert ["prefill speed, by arithmetic 1.375x", "1x", "1.250x", "+25.0 %"] in look.tables[0]
    assert "batch 1, prompt 256, 16 new tokens" in look.text


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    trees = [report(), report(keep=10), report(keep=30, extras={})]
    trees[1]["settings"]["method"] = "wanda"
    runs = [read_run(put(tmp_path / name, tree)) for name, tree in zip("abc", trees, strict=True)]
    table = side_by_side(runs)
    assert table.name == "perplexity on other text"
    spent = [f"{sum(tree['seconds'].values()):.1f}" for tree in trees]
    assert table.rows == (
        ("a", "0.375", "spap", "37.5 %", "7.1250", "8.8750", "25 000", spent[0]),
        ("b", "0.75", "wanda", "75 %", "7.1250", "9.2500", "10 000", spent[1]),
        ("c", "0.25", "spap", "25 %", DASH, DASH, "30 000", spent[2]),
    )


def test_names_are_only_shown(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script> $\\frac$", '"><img src=x onerror=alert(1)>', "{{ 1 }} \u6a21"]
    tree = report()
    tree["model"]["name"], tree["versions"]["device"], tree["calibration"]["description"] = names
    look = Look(page_of(tmp_path, tree))
    assert not [attributes for tag, attributes in look.tags if tag in ("script", "img") or "onerror" in attributes]
    assert all(name in look.text for name in names)
