"""``spap report``."""

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def report(
    *folders: Annotated[Path, Parameter(required=True)],
    output: Path | None = None,
    png: Path | None = None,
    bench: Annotated[tuple[Path, ...], Parameter(show_default=False)] = (),
    overwrite: bool = False,
) -> None:
    """Show what pruning runs did: one page with plots and tables, and the plots as PNG files.

    ```
    spap report pruned
    spap report pruned --bench speed.json --output page.html
    ```

    The page begins with what was removed and what it cost, and ends with the settings. It is a single file and loads
    nothing from the network. Several runs are shown side by side and plotted against sparsity.

    Args:
        folders: Pruned checkpoints as spap prune writes them, or a folder that holds several, as a run with several
            sparsities makes it.
        output: The page. By default spap_report.html in the folder, or in the folder that holds all of them.
        png: Folder for the plots, whose names begin with the page's. By default that of the page.
        bench: File that spap bench DENSE PRUNED --json wrote about one of the runs. The option may be repeated.
        overwrite: Replace existing pages and plots, if spap report wrote them and they have not been changed since.
    """
    from spap_jax.cli.console import err, waiting
    from spap_jax.errors import UserError

    try:
        from spap_jax.report.draw import png as drawn
        from spap_jax.report.page import render
        from spap_jax.report.read import read_runs, with_sparsities
        from spap_jax.report.write import check_places, write_all
        from spap_jax.storage.location import real_path
    except ModuleNotFoundError as error:
        raise UserError(
            f"spap report needs {error.name}, which is not installed: install it with pip install 'spap-jax[report]'."
        ) from error

    page = output or Path(os.path.commonpath([real_path(folder) for folder in folders]), "spap_report.html")
    check_places([page], overwrite)
    runs = read_runs(with_sparsities(folders), bench)
    with waiting(f"drawing {len(runs)} run{'s' if len(runs) > 1 else ''}"):
        text, figures = render(runs)
        plots = {(png or page.parent) / f"{page.stem}-{name}": drawn(figure) for name, figure in figures.items()}
    write_all(plots | {page: text.encode()}, overwrite)
    err.print(f"wrote {page} and {len(plots)} plots in {png or page.parent}")
