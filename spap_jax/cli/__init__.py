"""The command line, ``spap COMMAND``."""

import contextlib
import io
import os
import platform
import sys
from collections.abc import Sequence

from spap_jax.data.auto_tokenizer import leave_pytorch_out
from spap_jax.errors import naming_flags, printable
from spap_jax.storage.location import cache


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, by default of the process's command line.

    One of several processes does not return after an error, but exits.

    Returns:
        The exit code: 0 for success, 2 for an error that the user can fix, 75 if the same command goes on from here,
        1 for a bug in this program.
    """
    from spap_jax.cli import failures
    from spap_jax.cli.app import app
    from spap_jax.cli.console import check_results, notices

    if arguments is None:  # the process is the command's own
        leave_pytorch_out()
        _keep_compiled_programs()
    words = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that its encoding lacks are escaped
            stream.reconfigure(errors="backslashreplace")
    with naming_flags():
        try:
            with notices():
                app.meta(words, exit_on_error=False, print_error=False, result_action="return_value")
            check_results()
            return 0
        except (Exception, KeyboardInterrupt) as error:
            code, sentence = failures.failure(error)
    with contextlib.suppress(OSError):  # standard error itself may be on a full disk
        print(f"spap: {printable(sentence)}", file=sys.stderr)
    if failures.is_one_of_several():
        failures.leave(code)
    return code


def _keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs for later commands on this machine, unless its own variables say otherwise."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache() / "compiled" / platform.node()))
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**32))
