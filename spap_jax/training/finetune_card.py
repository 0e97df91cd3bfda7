"""The model card of a trained checkpoint: the card of the pruned one, with a section about the training appended."""

from pathlib import Path

from spap_jax.pruning.prune_card import card_head
from spap_jax.reporting.schema import FinetuneReport

_PRUNED = "spap_report.json"
"""File name of the pruning report."""

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


def trained_files(report: FinetuneReport, folder: Path | None) -> dict[str, str]:
    """Returns the files beside the weights of a trained checkpoint, by name: its report, its card, and older reports.

    Args:
        report: The report of the training.
        folder: The checkpoint that was trained.
    """
    files = {"spap_finetune.json": report.to_json(), "README.md": trained_card(report, folder)}
    if folder and (folder / _PRUNED).is_file():
        files[_PRUNED] = (folder / _PRUNED).read_text(encoding="utf-8")
    return files


def trained_card(report: FinetuneReport, folder: Path | None) -> str:
    """Returns the README.md of a trained checkpoint; every figure comes from the report.

    Args:
        report: The report of the training.
        folder: The checkpoint that was trained; its card is kept if SPAP-JAX wrote it.
    """
    there = folder / "README.md" if folder else None
    card = there.read_text(encoding="utf-8") if there and there.is_file() else ""
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
