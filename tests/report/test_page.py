"""The page is self-contained, shows the report's numbers, and never executes the content of a name."""

import io
import itertools
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from reports import DASH, MINUS, Look, put, report, run, with_fewer_heads

from spap_jax.errors import UserError
from spap_jax.report import draw
from spap_jax.report.page import render
from spap_jax.report.read import read_runs
from spap_jax.report.schema import (
    Check,
    DataAccount,
    Extras,
    FinetuneReport,
    GenerationWorkload,
    Measured,
    Perplexities,
    Ratios,
    RunReports,
    SpeedReport,
)
from spap_jax.report.tables import side_by_side


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunReports]:
    folder = tmp_path_factory.mktemp("runs")
    return read_runs([put(folder / "one", report()), put(folder / "two", report(keep=10))])


@pytest.fixture(scope="module")
def two(runs: list[RunReports]) -> tuple[str, dict[str, Figure]]:
    return render(runs)


def test_nothing_is_fetched(two: tuple[str, dict[str, Figure]]) -> None:
    page, _ = two
    look = Look(page)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in look.tags}
    links = [
        value
        for _, attributes in look.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "action", "data")
    ]
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert set(re.findall(r"url\((.)", page)) == {"#"}
    assert "@import" not in look.style
    names = set(re.findall(r"https?://[^\s\"'<>]+", page))
    assert names == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names of formats, not addresses
    policy = next(a["content"] for tag, a in look.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")


def test_every_drawing_finds_its_own_parts(two: tuple[str, dict[str, Figure]]) -> None:
    page, _ = two
    ids = [attributes["id"] for _, attributes in Look(page).tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    used = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert used <= set(ids)


def test_a_run_that_was_trained_since_says_so(tmp_path: Path) -> None:
    """The report is that of the pruning, so without a note its numbers would be taken for the trained model's."""
    names, trained = ("pruned", "trained"), FinetuneReport(
        settings={}, model="pruned", teacher=None, objective="next token", data=DataAccount(1, 8, "text", None),
        trained_parameters=7, checks=(Check(0, 0, (), 2.5, True, 0.1), Check(1234, 9872, (2.5,), 2.25, True, 0.1)),
        versions={}, seconds=1.0, extras=Extras(perplexity=Perplexities("a third text", 8.75, 7.5)),
    )  # fmt: skip
    folders = [put(tmp_path / name) for name in names]
    (folders[1] / "spap_finetune.json").write_text(trained.to_json())
    page, _ = render(read_runs(folders))
    look = Look(page)
    words = "for 1 234 steps (next token); perplexity on a third text: 8.7500 before them, 7.5000 after."
    assert look.text.replace("\N{NARROW NO-BREAK SPACE}", " ").count(words) == 1
    head, *rows = look.tables[0]
    assert [row[head.index("trained")] for row in rows] == [DASH, "7.5000"]
    first, second = (row[head.index("measured on")] for row in rows)
    assert second == f"{first}; a third text"
    assert "Trained since" not in render(read_runs(folders[:1]))[0]
    (folders[1] / "spap_finetune.json").write_text(trained.to_json()[:-20])
    with pytest.raises(UserError, match=r"spap_finetune.json is cut off, or not what this version's spap finetune"):
        read_runs(folders)


def test_drawings_have_words(two: tuple[str, dict[str, Figure]]) -> None:
    page, figures = two
    tags = Look(page).tags
    words = [attributes["aria-label"] for _, attributes in tags if attributes.get("role") == "img"]
    assert len(words) == len(figures) == sum(tag == "svg" for tag, _ in tags) == 13
    assert all(len(label) > 20 for label in words)


def test_pictures(two: tuple[str, dict[str, Figure]]) -> None:
    images = {name: draw.png(figure) for name, figure in two[1].items()}
    own = ("errors", "gains", "channels", "losses", "seconds")
    names = {f"{prefix}-{name}.png" for prefix, name in itertools.product(("1-one", "2-two"), own)}
    assert set(images) == names | {f"compare-{name}.png" for name in ("perplexity", "parameters", "bytes")}
    for png in images.values():
        pixels = matplotlib.image.imread(io.BytesIO(png))
        assert min(pixels.shape[:2]) > 150
        assert pixels[..., :3].std() > 0.02


def test_the_numbers_of_a_run(tmp_path: Path) -> None:
    tree = report(advice=["more text would help"])
    page, _ = render([run(tmp_path, tree)])
    look = Look(page)
    before, layers, joint = look.tables
    assert before == [
        ["", "before", "after", "change"],
        ["parameters", "1 234 567", "25 000", f"{MINUS}98.0 %"],
        ["MLP parameters", "765 432", "2 500", f"{MINUS}99.7 %"],
        ["MLP channels, all layers", "120", "75", f"{MINUS}37.5 %"],
        ["weights on disk", "4.94 MB", "100 kB", f"{MINUS}98.0 %"],
        ["perplexity", "7.1250", "8.8750", "+24.6 %"],
    ]
    for row, layer in zip(layers[1:], tree["layers"], strict=True):
        errors = [f"{100 * value:.2f}" for tokens in ("calibration", "held_out") for value in layer[tokens].values()]
        counts = [str(layer[name]) for name in ("swaps", "improving_swaps", "rounds")]
        assert row == [str(layer["layer"]), "25", *errors, *counts, f"{sum(layer['seconds'].values()):.1f}"]
    for row, check in zip(joint[1:], tree["joint"], strict=True):
        mean = f"{np.mean(check['losses']):.4f}" if check["losses"] else DASH
        numbers = [str(check["step"]), f"{check['tokens']:,}".replace(",", " "), mean, f"{check['held_out']:.4f}"]
        assert row == [*numbers, "yes" if check["taken"] else "no"]
    assert "Every layer keeps 25 of 40 MLP channels." in look.text
    for shown in (
        "owner/model",
        "LlamaForCausalLM",
        "some text (17 sequences of 64 tokens)",
        "ab" * 32,
        "other text",
        "Advice",
        "more text would help",
    ):
        assert shown in look.text
    assert f"{sum(tree['seconds'].values()):.1f} seconds" in look.text
    assert "988 MB" in look.text
    pairs = re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd></div>", page)
    assert pairs == [
        ("sparsity", "0.375"),
        ("round_to", "1"),
        ("method", "spap"),
        ("joint_passes", DASH),
        ("rounds", "2"),
        ("sampled", "0"),
        ("spap-jax", "0.1.0"),
        ("jax", "0.10.2"),
    ]


def test_both_sparsities_where_rounding_led_to_another_than_was_asked_for(tmp_path: Path):
    asked = {"channels": {"asked": 0.3, "achieved": 0.375}, "heads": {"asked": 0.0, "achieved": 0.0}}
    page, _ = render([run(tmp_path, report(sparsity=asked))])
    assert "of 40 MLP channels (30 % asked for)." in Look(page).text
    asked["heads"] = {"asked": 0.3, "achieved": 0.5}
    page, _ = render(read_runs([put(tmp_path / "heads", with_fewer_heads(report(sparsity=asked)))]))
    assert "of 40 MLP channels (30 % asked for), 4 of 8 attention heads (30 % asked for) and 1 of 2" in Look(page).text


def test_the_names_of_plots_fit_however_long_those_of_the_runs_are(tmp_path: Path):
    runs = read_runs([put(tmp_path / (letter * 80), report()) for letter in "\u5b57\u540d"])
    _, plots = render(runs)
    assert max(len(name.encode()) for name in plots) < 120


def test_what_a_run_lacks_is_not_there(tmp_path: Path) -> None:
    tree = report(checks=0, held_out=False, extras={})
    tree["calibration"]["sha256"] = None
    look = Look(render([run(tmp_path, tree)])[0])
    before, layers = look.tables
    assert [row[0] for row in before] == ["", "parameters", "MLP parameters", "MLP channels, all layers"]
    assert not [name for name in layers[0] if "held-out" in name]
    assert len(layers[1]) == len(layers[0])
    assert not re.search("None|nan|SHA-256|measured on|Peak memory|joint steps", look.text)
    assert "Perplexity was not measured" in look.text


def heading(title: str) -> str:
    """Return the first heading of a page, in which no line break separates a number from its percent sign."""
    return f"<h1>{title.replace(' %', '&nbsp;%')}</h1>"


def headlines(page: str) -> dict[str, tuple[str, str]]:
    found = re.findall(r'<div><dt>(.*?)</dt><dd>(.*?)</dd><dd class="detail">(.*?)</dd></div>', page)
    return {name: (value, detail) for name, value, detail in found}


def test_it_begins_with_the_result_and_ends_with_the_settings(tmp_path: Path) -> None:
    page, _ = render([run(tmp_path, report())])
    title = "model, 37.5 % of the MLP channels removed"
    parts = (f"<title>{title}</title>", heading(title), '<dl class="headlines">', "<figure", "Before and after",
             "<summary>Every layer in numbers", "Calibration", "<summary>Settings", "<summary>Versions")  # fmt: skip
    places = [page.index(part) for part in parts]
    assert places == sorted(places)
    assert page.rindex("</figure>") < page.index("Before and after")
    assert list(headlines(page).items()) == [
        ("Perplexity", ("+24.6 %", "7.1250 → 8.8750")),
        ("Size on disk", (f"{MINUS}98.0 %", "4.94 MB → 100 kB")),
        ("Parameters", (f"{MINUS}98.0 %", "1 234 567 → 25 000")),
    ]


@pytest.mark.parametrize("name", ["/home/someone/models/model", "models/model/", "owner/model", "model"])
def test_the_title_is_a_name(name: str, tmp_path: Path) -> None:
    tree = report(checks=0)
    tree["model"]["name"] = name
    assert heading("model, 37.5 % of the MLP channels removed") in render([run(tmp_path, tree)])[0]


def test_heads_that_were_removed(tmp_path: Path) -> None:
    """Removed heads are shown in the title, the numbers, separate plots, and a separate line beside other runs."""
    tree = with_fewer_heads(report(checks=0))
    page, figures = render([run(tmp_path, tree)])
    look = Look(page)
    assert heading("model, 37.5 % of the MLP channels and 50 % of the attention heads removed") in page
    assert "Every layer keeps 25 of 40 MLP channels, 4 of 8 attention heads and 1 of 2 key/value heads." in look.text
    before, layers = look.tables
    assert ["attention heads of a layer", "8", "4", f"{MINUS}50.0 %"] in before
    assert ["key/value heads of a layer", "2", "1", f"{MINUS}50.0 %"] in before
    cells = dict(zip(layers[0], layers[1], strict=True))
    assert cells["key/value heads kept"] == "1"
    assert (cells["attention chosen"], cells["attention held-out refit"]) == ("50.00", "30.00")
    assert {"attention-errors.png", "attention-gains.png"} < set(figures)
    both = read_runs([put(tmp_path / "all", report(checks=0)), tmp_path / "run"])
    page, _ = render(both)
    assert [row[2] for row in Look(page).tables[0]] == ["heads removed", DASH, "50 %"]
    assert "all heads kept" in page
    assert "50 % of the heads removed" in page


def test_a_perplexity_that_was_not_finite(tmp_path: Path) -> None:
    tree = report()
    tree["extras"]["perplexity"]["after"] = None
    page = render([run(tmp_path, tree)])[0]
    assert Look(page).tables[0][-1] == ["perplexity", "7.1250", "not finite", DASH]
    assert headlines(page)["Perplexity"] == ("not finite", "7.1250 → not finite")


def test_several_runs(tmp_path: Path) -> None:
    trees = [report(), report(keep=10), report(keep=30, extras={})]
    trees[1]["settings"]["method"] = "wanda"
    runs = read_runs([put(tmp_path / name, tree) for name, tree in zip(("a", "b", "c"), trees, strict=True)])
    runs[1] = RunReports("b", runs[1].pruned, speed := measured())
    page, _ = render(runs)
    look = Look(page)
    head, *rows = look.tables[0]
    assert head == ["run", "channels removed", "dense perplexity", "pruned", "change", "parameters",
                    "weights on disk", "prefill speed", "decode speed", "seconds", "sparsity", "method"]  # fmt: skip
    spent = [f"{sum(tree['seconds'].values()):.1f}" for tree in trees]
    assert rows == [
        ["a", "37.5 %", "7.1250", "8.8750", "+24.6 %", "25 000", "100 kB", DASH, DASH, spent[0], "0.375", "spap"],
        ["b", "75 %", "7.1250", "9.2500", "+29.8 %", "10 000", "40 kB", "1.250x", "1.500x", spent[1], "0.75", "wanda"],
        ["c", "25 %", DASH, DASH, DASH, "30 000", DASH, DASH, DASH, spent[2], "0.25", "spap"],
    ]  # fmt: skip
    assert speed.workload.prompt == 256
    assert "batch 1, prompt 256, 16 new tokens, median of 7 runs" in look.text
    assert ["prefill speed, by arithmetic 1.375x", "1x", "1.250x", "+25.0 %"] in [r for t in look.tables for r in t]
    assert re.findall(r"<h1>(.*?)</h1>", page) == ["model, 3 pruning runs"]
    shares = {"a": "37.5", "b": "75", "c": "25"}
    removed = [f"{label}: {share}&nbsp;% of the MLP channels removed" for label, share in shares.items()]
    assert re.findall(r"<h2>(.*?)</h2>", page) == removed
    assert re.findall(r"<strong>(Prefill speed|Decode speed)</strong>", page) == ["Prefill speed", "Decode speed"]


def measured() -> SpeedReport:
    models = (Measured("dense", 1234567), Measured("b", 10000))
    return SpeedReport(models, GenerationWorkload(1, 256, 16, 7), Ratios(1.25, 1.5), Ratios(1.375, 1.625))


def test_models_and_settings_that_differ_are_named(tmp_path: Path) -> None:
    trees = [report(), report()]
    trees[1]["model"]["name"] = "owner/other"
    trees[1]["settings"]["a new one"] = [1, 2]
    runs = read_runs([put(tmp_path / name, tree) for name, tree in zip("ab", trees, strict=True)])
    table = side_by_side(runs)
    assert (*table.columns[:2], table.columns[-1]) == ("run", "model", "a new one")
    found = [(*row[:2], row[-1]) for row in table.rows]
    assert found == [("a", "owner/model", DASH), ("b", "owner/other", "[1, 2]")]


def test_names_are_only_shown(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script> $\\frac$", '"><img src=x onerror=alert(1)>', "{{ 1 }} \u6a21"]
    trees = [report(), report(keep=10)]
    trees[0]["model"]["name"], trees[0]["versions"]["device"], trees[0]["calibration"]["description"] = names
    page, figures = render(read_runs([put(tmp_path / f"{place}<b>", tree) for place, tree in enumerate(trees)]))
    look = Look(page)
    assert not [attributes for tag, attributes in look.tags if tag in ("script", "img", "b") or "onerror" in attributes]
    assert all(name in look.text for name in (*names, "0<b>"))
    assert all(re.fullmatch(r"[\w.-]+\.png", file) for file in figures)


def test_the_same_reports_give_the_same_page(runs: list[RunReports], two: tuple[str, dict[str, Figure]]) -> None:
    page, figures = render(runs)
    assert page == two[0]
    name = next(iter(figures))
    assert draw.png(figures[name]) == draw.png(two[1][name])
