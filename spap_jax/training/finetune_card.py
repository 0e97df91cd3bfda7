"""The model card of a trained checkpoint: the card of the pruned one, with a section about the training appended."""

from spap_jax.checkpoint.side_files import accounts
from spap_jax.models.model import Source
from spap_jax.report.card import card_head, converted_files
from spap_jax.report.schema import FinetuneReport

_PRUNED, _TRAINED, _EARLIER = "spap_report.json", "spap_finetune.json", "spap_finetune-{number}.json"
"""File names of the pruning report, that of the last training, and those of earlier ones."""

_NEW = """\
{head}
# {name}, trained

The licence and the limits of the original model apply.
"""

_SECTION = """
## Trained {afterwards}

{kind} trained for {steps} steps by SPAP-JAX {version} {goal}, on {data}. The weights of
step {kept}, the best on sequences that were held out, were kept; figures above this section are from before.

| | before | after |
| --- | ---: | ---: |
{rows}

Every setting and the loss of every step are in `spap_finetune.json`.
"""


def trained_files(report: FinetuneReport, source: Source) -> dict[str, str]:
    """Returns the files beside the weights of a trained checkpoint, by name: its report, its card, and older reports.

    Args:
        report: The report of the training.
        source: Where the model that was trained came from.
    """
    there = converted_files(accounts(source), None, stock=True)
    files = {name: content.decode() for name, content in there.items()}
    card = files.pop("README.md", "")
    if earlier := files.pop(_TRAINED, None):  # this is not the first training
        name = _EARLIER.format(number=1 + sum(name != _PRUNED for name in files))
        files[name], card = earlier, card.replace(f"`{_TRAINED}`", f"`{name}`")
    return files | {_TRAINED: report.to_json(), "README.md": trained_card(report, card)}


def trained_card(report: FinetuneReport, card: str) -> str:
    """Returns the README.md of a trained checkpoint; every figure comes from the report.

    Args:
        report: The report of the training.
        card: The card of the checkpoint that was trained, if it has one, which is kept if SPAP-JAX wrote it.
    """
    ours = "\n- spap-jax\n" in card
    held_out = report.held_out
    rows = [(f"loss on held-out sequences ({report.objective})", held_out["before"], held_out["after"])]
    if measured := report.extras.perplexity:
        rows.append((f"perplexity on {measured.data}", measured.before, measured.after))
    section = _SECTION.format(
        afterwards="after pruning" if ours else "on",
        kind="All weights were" if report.settings["full"] else "Low-rank updates of the projections (LoRA) were",
        steps=report.steps,
        version=report.versions["spap-jax"],
        goal="towards the predictions of the dense model" if report.teacher else "to predict the next token",
        data=report.data.description,
        kept=report.kept.step,
        rows="\n".join(f"| {name} | {before:.4f} | {after:.4f} |" for name, before, after in rows),
    )
    head = card_head(report.model, "transformers", "spap-jax")
    return (card if ours else _NEW.format(head=head, name=report.model)) + section
