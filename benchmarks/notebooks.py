"""Runs the notebooks of ``examples/`` from the first cell to the last: ``python -m benchmarks.notebooks``.

The notebooks are stored with their text output and figures, so that they can be read without being run; this command
writes that output. Timings, and warnings of other libraries that contain local paths, are left out.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

EXAMPLES = Path(__file__).parents[1] / "examples"
SECONDS = 600
"""Timeout of one cell, in seconds."""


def executed(notebook: Path, folder: Path) -> NotebookNode:
    """Runs a notebook and returns it with its outputs.

    Args:
        notebook: File to run; it is not modified.
        folder: Working directory of the run, with the example model and texts.

    Raises:
        CellExecutionError: a cell raised.
    """
    content = nbformat.read(notebook, as_version=4)
    client = NotebookClient(
        content,
        timeout=SECONDS,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    content = client.execute()
    for cell in content.cells:
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    return content


def main() -> int:
    """Runs all notebooks in place."""
    for notebook in sorted(EXAMPLES.glob("*.ipynb")):
        print(f"running {notebook.name} ...", file=sys.stderr)
        nbformat.write(executed(notebook, notebook.parent), notebook)
    return 0


if __name__ == "__main__":
    sys.exit(main())
