"""The notebooks of ``examples/``, run from the first cell to the last: ``python -m benchmarks.notebooks``.

They are kept with what they printed and drew, so that they can be read without being run; this is what writes it. What
a run adds beyond that, warnings of other libraries with paths of this machine and times, is left out.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

EXAMPLES = Path(__file__).parents[1] / "examples"
SECONDS = 600
"""For one cell, at most."""


def executed(notebook: Path, folder: Path) -> NotebookNode:
    """The notebook after a run.

    Args:
        notebook: File to run; it is left as it is.
        folder: Where it runs, with the example model and texts.

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
    """Runs all of them in place."""
    for notebook in sorted(EXAMPLES.glob("*.ipynb")):
        print(f"running {notebook.name} ...", file=sys.stderr)
        nbformat.write(executed(notebook, notebook.parent), notebook)
    return 0


if __name__ == "__main__":
    sys.exit(main())
