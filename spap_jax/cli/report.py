"""``spap report``."""

import os
import secrets
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from spap_jax.errors import UserError


def report(
    *folders: Annotated[Path, Parameter(required=True)],
    output: Path | None = None,
    bench: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Show what a pruning run did, as a page with plots and tables, or compare several in a table.

    ```
    spap report pruned
    spap report pruned --bench speed.json --output page.html
    spap report pruned-20 pruned-30
    ```

    The page begins with what was removed and what it cost, and ends with the settings. It is a single file and loads
    nothing from the network.

    Args:
        folders: A pruned checkpoint as spap prune writes it. Several, or a folder that holds several, are compared in
            a table on the terminal.
        output: The page, a file that ends in .html. By default spap_report.html in the folder.
        bench: File that spap bench DENSE PRUNED --json wrote about the run. By default without speeds.
        overwrite: Replace a page that exists.
    """
    from spap_jax.cli.console import err, table, waiting

    try:
        from spap_jax.report.figures import plots
        from spap_jax.report.page import render, side_by_side
        from spap_jax.report.read import read_run, with_sparsities
        from spap_jax.storage.location import real_path
    except ModuleNotFoundError as error:
        raise UserError(
            f"spap report needs {error.name}, which is not installed: install it with pip install 'spap-jax[report]'."
        ) from error

    runs = [read_run(folder, bench) for folder in with_sparsities(folders)]
    if len(runs) > 1:
        if output or bench:
            raise UserError("a page is of one run, and these are several: name one of them.")
        compared = side_by_side(runs)
        table(compared.name, compared.columns, compared.rows)
        return
    page = real_path(output or runs[0].folder / "spap_report.html")
    if page.suffix != ".html":
        raise UserError(f"{page} is not a name of a page: end it in .html.")
    if os.path.lexists(page) and not (overwrite and page.is_file()):
        raise UserError(f"{page} exists: name another place, or pass --overwrite to replace a page of yours.")
    with waiting("drawing"):
        content = render(runs[0], plots(runs[0].pruned)).encode()
    _write(page, content)
    err.print(f"wrote {page}")


def _write(file: Path, content: bytes) -> None:
    """Writes a file, complete or not at all."""
    partial = file.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{file} cannot be written ({error.strerror}): name another file.") from error
