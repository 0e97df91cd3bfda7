"""The command line: ``spap prune | eval | bench | report | convert | doctor``."""

import ctypes
import sys
from collections.abc import Sequence

from cyclopts import CycloptsError

from spap_jax.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Words of the command line; those of the process where absent.

    Returns:
        The exit code: 0 for success, 2 for something the person can mend (one sentence on standard error).
    """
    from spap_jax.cli.app import launch

    _return_freed_memory()
    try:
        launch(sys.argv[1:] if arguments is None else list(arguments))
    except (UserError, CycloptsError) as error:
        print(f"spap: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("spap: interrupted; nothing unfinished was written.", file=sys.stderr)
        return 130
    return 0


def _return_freed_memory() -> None:
    """Has glibc give every large buffer back when it is freed.

    By default it keeps those of up to 32 MB, and with the buffers of one layer after another the process ends up a
    quarter larger than what it holds. Other C libraries have no such setting and need none.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(mmap_threshold, 1 << 20)
