"""Identity of a run, and recovery of an interrupted run's steps by the next run."""

from pathlib import Path

from spap_jax.checkpoint.publish import read_made
from spap_jax.checkpoint.unfinished import Unfinished
from spap_jax.parallel import processes
from spap_jax.report.schema import FinetuneReport, PruneReport, parsed


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
