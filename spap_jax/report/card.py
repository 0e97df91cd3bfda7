"""The model cards of pruned checkpoints, and of trained ones, to which a section is appended."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from spap_jax.report.schema import Extras, FinetuneReport, PruneReport, Row, parsed

_TEXT = """\
{head}
# {name}, {removed} removed

Made from `{name}` by SPAP-JAX {version}: structured pruning with recovery in the same run, after
[SPAP](https://arxiv.org/abs/2505.03373). {shape}; everything else
about the architecture ({architecture}) is as it was{but}{loaders}.
Channels were chosen by the method `{selection}`; {update}.

| | before | after | change |
| --- | ---: | ---: | ---: |
{rows}

Calibration: {calibration}.{measured}{reading}
Every setting, the channels kept and each layer's error are in `spap_report.json`.

```python
{code}
```

The licence and the limits of the original model apply. Pruning can change what a model knows and how it behaves: test
it on your own task before you rely on it.
"""

_STOCK_CODE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")"""

_TOWER_CODE = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("PATH")
processor = AutoProcessor.from_pretrained("PATH")"""

_OWN_CODE = """\
import spap_jax

model = spap_jax.load("PATH")"""

OWN_LOADER = (
    "it loads with spap_jax only: stock transformers needs one width for all layers, as the allocation 'uniform' keeps"
)
"""Note on loading a model whose layers differ in width."""

ORBAX_LOADER = "this Orbax checkpoint loads with spap_jax, and spap convert makes the one that stock tools load"
"""Note on loading a model in the format of Orbax."""

_READING = """
Only the part that reads and writes text was pruned, on text alone, and it alone is counted here: the rest is as it was.
What this does to how the model reads images was not measured."""

_UPDATES = {
    "none": "the weights of those kept are as they were (update `none`)",
    "bias": "a bias makes up for the mean of those removed (update `bias`)",
    "refit": "the output projection of those kept was solved for in closed form (update `refit`)",
    "alternate": "the output projection of those kept was solved for in closed form{more} (update `alternate`)",
}
_ROUNDS = ", and their weights were recovered by alternating minimisation"
_STEPS = "; then {count} optimizer steps brought the predictions of the whole model nearer to those of the dense one"
_ADAPTED = ", and adapted it to the calibration text"

_LOADERS = (
    "tools that read `head_dim` from `config.json`, as transformers 5 does, load it; those that divide `hidden_size` "
    "by the number of heads do not"
)


def card_head(name: str, library: str, *tags: str, task: str = "text-generation") -> str:
    """Builds the card's metadata block for the hub.

    Args:
        name: The public name of the original model. The hub accepts only its own ids, which contain a slash.
    """
    lines = [
        *([f"base_model: {name}"] if "/" in name else []),
        f"library_name: {library}",
        f"pipeline_tag: {task}",
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]
    return "\n".join(["---", *lines, "---", ""])


def pruned_files(report: PruneReport) -> dict[str, str]:
    """Returns the files written next to the weights of a pruned checkpoint, by name: its report and its card."""
    return {"spap_report.json": report.to_json(), "README.md": model_card(report)}


def converted_files(files: Mapping[str, bytes], weight_bytes: int | None, stock: bool) -> dict[str, bytes]:
    """Returns the files beside the weights of a pruned checkpoint for the same model in another form.

    Args:
        files: The report, the card and other files, by name. The generated part of the card is written anew; a report
            that this version cannot read is left as it is, with its card.
        weight_bytes: Bytes of the weights in the new form; None if they are as many as before.
    """
    try:
        report = parsed(files.get("spap_report.json", b""), PruneReport)
    except ValueError:
        return dict(files)
    size = report.extras.bytes and replace(report.extras.bytes, after=weight_bytes or report.extras.bytes.after)
    new = replace(report, extras=replace(report.extras, bytes=size))
    card = files.get("README.md", b"")
    for was_stock in (True, False):
        card = card.replace(model_card(report, was_stock).encode(), model_card(new, stock).encode())
    return {**files, "spap_report.json": new.to_json().encode(), "README.md": card}


def model_card(report: PruneReport, stock: bool = True) -> str:
    """Builds the README.md of a pruned checkpoint from its report; ``stock`` unless it is an Orbax folder."""
    stock &= report.one_width
    model, biases = report.model, report.model.mlp_bias
    return _TEXT.format(
        head=card_head(
            model.name,
            "transformers" if stock else "spap-jax",
            "pruned",
            "spap-jax",
            task="image-text-to-text" if model.in_tower else "text-generation",
        ),
        name=model.name,
        version=report.versions["spap-jax"],
        removed=report.sparsity.words,
        shape=report.shape,
        loaders=_loaders(report) if stock or not report.one_width else f"; {ORBAX_LOADER}",
        code=(_TOWER_CODE if model.in_tower else _STOCK_CODE) if stock else _OWN_CODE,
        architecture=model.architecture,
        but=" but for added biases in the MLP" if biases.after and not biases.before else "",
        selection=report.method.selection,
        update=_recovered(report),
        rows=_lines(report.rows),
        calibration=report.calibration.description,
        measured=_measured(report.extras),
        reading=_READING * model.in_tower,
    )


def _lines(rows: Sequence[Row]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _measured(extras: Extras) -> str:
    """Says on what perplexity was measured, if it was."""
    return f" Perplexity: {extras.perplexity.data}." if extras.perplexity else ""


def _recovered(report: PruneReport) -> str:
    """Describes how the kept weights make up for the removed ones."""
    rounds = any(layer.rounds for layer in report.layers)
    steps = report.kept.step if report.kept else 0
    said = _UPDATES[report.method.update]
    return said.format(more=_ROUNDS * rounds + (_STEPS.format(count=steps) + _ADAPTED * report.adapted) * bool(steps))


def _loaders(report: PruneReport) -> str:
    if not report.one_width:
        return f"; {OWN_LOADER}"
    return f", so {_LOADERS if report.fewer_heads else 'stock tools load it'}"


_PRUNED, _TRAINED, _EARLIER = "spap_report.json", "spap_finetune.json", "spap_finetune-{number}.json"
"""File names of the pruning report, that of the last training, and those of earlier ones."""

_NEW_CARD = """\
{head}
# {name}, trained

The licence and the limits of the original model apply.
"""

_SECTION = """
## Trained {afterwards}

{kind} trained for {steps} steps by SPAP-JAX {version} {goal}, on {data}. The weights of
step {kept}, the best on sequences that were held out, were kept; figures above this section are from before.{measured}

| | before | after | change |
| --- | ---: | ---: | ---: |
{rows}

Every setting and the loss of every step are in `spap_finetune.json`.
"""


def trained_files(report: FinetuneReport, accounts: Mapping[str, bytes]) -> dict[str, str]:
    """Returns the files beside the weights of a trained checkpoint, by name: its report, its card, and older reports.

    ``accounts`` are the card and the reports of the model that was trained, by name.
    """
    files = {name: content.decode() for name, content in converted_files(accounts, None, stock=True).items()}
    card = files.pop("README.md", "")
    if earlier := files.pop(_TRAINED, None):  # this is not the first training
        name = _EARLIER.format(number=1 + sum(name != _PRUNED for name in files))
        files[name], card = earlier, card.replace(f"`{_TRAINED}`", f"`{name}`")
    return files | {_TRAINED: report.to_json(), "README.md": trained_card(report, card)}


def trained_card(report: FinetuneReport, card: str) -> str:
    """Returns the README.md of a trained checkpoint, from its report; it is appended to a card of SPAP-JAX."""
    ours = "\n- spap-jax\n" in card
    section = _SECTION.format(
        afterwards="after pruning" if ours else "on",
        kind="All weights were" if report.settings["full"] else "Low-rank updates of the projections (LoRA) were",
        steps=report.steps,
        version=report.versions["spap-jax"],
        goal="towards the predictions of the dense model" if report.teacher else "to predict the next token",
        data=report.data.description,
        kept=report.kept.step,
        rows=_lines(report.rows),
        measured=_measured(report.extras),
    )
    head = card_head(report.model, "transformers", "spap-jax")
    return (card if ours else _NEW_CARD.format(head=head, name=report.model)) + section
