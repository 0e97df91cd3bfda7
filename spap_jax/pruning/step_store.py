"""Identity of a run, and recovery of an interrupted run's steps by the next run."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from spap_jax.checkpoint.publish import read_made
from spap_jax.checkpoint.unfinished import Unfinished
from spap_jax.data.tokens import TokenBlocks
from spap_jax.parallel import processes
from spap_jax.pruning.prune_report import report_of
from spap_jax.pruning.run import Begun
from spap_jax.report.account import computing
from spap_jax.report.schema import FinetuneReport, PruneReport, parsed
from spap_jax.settings import PruneSettings


def prune_identity(
    model: str, blocks: TokenBlocks, judged: TokenBlocks | None, dtype: str | None, settings: PruneSettings
) -> dict[str, Any]:
    """Returns everything that the result of ``spap prune`` depends on, by name; a run resumes only if all are equal.

    Args:
        model: Fingerprint of the dense checkpoint.
        blocks: Calibration tokens, without those that the model writes: they follow from the rest.
        judged: Tokens on which perplexity is measured; None if it is not.
        dtype: Data type to which the weights are converted; None if they are not.
        settings: The pruning settings.
    """
    how = dataclasses.asdict(settings)
    texts = "".join(each.sha256 for each in (blocks, blocks.further) if each)
    read = hashlib.sha256(texts.encode()).hexdigest()
    tokens = {"calibration": read, "sequence length": blocks.tokens.shape[1]}
    output = {"evaluation": judged and judged.sha256, "dtype": dtype}
    return how | {"model": model} | tokens | output | computing()


def stored_steps(unfinished: Unfinished, output: str | Path) -> Begun | None:
    """Returns the steps of an earlier run, the same in every process; all processes must call this.

    Args:
        unfinished: The stored steps.
        output: Output folder of the run.

    Returns:
        The steps; None if the output is already complete, because a command that makes several outputs was interrupted
        later.
    """
    if is_made(unfinished, output, "spap_report.json", PruneReport):
        return None
    return Begun([report_of(each) for each in unfinished.told], unfinished.read)


def is_made(
    unfinished: Unfinished, output: str | Path, file: str, schema: type[PruneReport] | type[FinetuneReport]
) -> bool:
    """Whether the output already exists and was written by this run; all processes must call this.

    Args:
        unfinished: What is kept of the run.
        output: Output folder of the run.
        file: Name of the report in it.
        schema: What the report is.
    """

    def names_this_run() -> bool:
        try:
            return parsed(read_made(output, file) or b"", schema).extras.run == unfinished.name
        except ValueError:
            return False

    return processes.told_to_all(processes.leads() and unfinished.found and names_this_run())
