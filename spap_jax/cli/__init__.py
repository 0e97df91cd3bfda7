"""The command line: ``spap plan | prune | finetune | eval | bench | report | convert | push | doctor``."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cyclopts import CycloptsError

from spap_jax import memory
from spap_jax.errors import SpapWarning, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Words of the command line; those of the process where absent.

    Returns:
        The exit code: 0 for success, 2 for something the person can mend (one sentence on standard error). One of
        several processes does not return from an error, but ends.
    """
    from spap_jax.cli import processes
    from spap_jax.cli.app import launch

    memory.return_large_buffers()
    try:
        with _warnings_as_lines():
            launch(sys.argv[1:] if arguments is None else list(arguments))
        return 0
    except (UserError, CycloptsError) as error:
        code, said = 2, str(error)
    except KeyboardInterrupt:
        code, said = 130, "interrupted; no unfinished output is left."
    except Exception as error:
        if not processes.of_several():
            raise
        code, said = processes.why(error)
    print(f"spap: {said}", file=sys.stderr)
    if processes.of_several():
        processes.leave(code)
    return code


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Prints each of our warnings as one line on standard error, in the process that prints; others are left alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", SpapWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            from spap_jax.cli.console import err

            if issubclass(category, SpapWarning):
                err.print(f"spap: warning: {message}")
            else:
                others(message, category, *where, **more)

        warnings.showwarning = show
        yield
