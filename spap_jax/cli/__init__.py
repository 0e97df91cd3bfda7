"""The command line: ``spap plan | prune | finetune | eval | bench | report | convert | push | doctor``."""

import sys
from collections.abc import Sequence

from cyclopts import CycloptsError

from spap_jax import memory
from spap_jax.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Words of the command line; those of the process where absent.

    Returns:
        The exit code: 0 for success, 2 for something the person can mend (one sentence on standard error).
    """
    from spap_jax.cli.app import launch

    memory.return_large_buffers()
    try:
        launch(sys.argv[1:] if arguments is None else list(arguments))
    except (UserError, CycloptsError) as error:
        print(f"spap: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("spap: interrupted; no unfinished output is left.", file=sys.stderr)
        return 130
    return 0
