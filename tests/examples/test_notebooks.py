"""The notebooks run from the first cell to the last, and their stored outputs are those of a run.

``python tests/examples/test_notebooks.py`` runs them in place, and so renews these outputs.
"""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

EXAMPLES = Path(__file__).parents[2] / "examples"

NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
INPUTS = ("llama-stories", "stories_calibration.txt", "stories_evaluation.txt")
SMALL_PROBLEMS = ("solver_on_your_matrices", "what_the_solver_does")
"""Notebooks whose programs take longer to optimize than to run."""
FACTS = {
    "back_to_pytorch": ["'missing_keys': []", '"intermediate_size": 224', "True\n"],
    "flax_nnx": ["(6, 320, 96)", "'missing_keys': []", "the same logits: True"],
    "first_steps": ["layer 5: 224 channels stay", "model.safetensors"],
    "solver_on_your_matrices": ["solved: True", "2 failed error nan", "outside of jit: the moments hold NaN"],
    "several_devices": ["cpu:3 has chunks range(6, 8)", f"{'all-reduce':20} 1", f"{'all-gather':20} 0"],
    "what_the_solver_does": ["G (320, 320)", "with swaps      best of all in"],
}
"""Strings that a run must print, by notebook."""


def read(notebook: Path) -> NotebookNode:
    return nbformat.read(notebook, as_version=4)


def executed(notebook: Path, folder: Path) -> NotebookNode:
    """Run a notebook in a folder and return it without what libraries warn of, which may contain local paths."""
    settings = {"timeout": 600, "record_timing": False, "coalesce_streams": True}
    ran = NotebookClient(read(notebook), resources={"metadata": {"path": str(folder)}}, **settings).execute()
    for cell in code(ran):
        cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    return ran


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(notebook: NotebookNode) -> list[list[str]]:
    """Return the kinds of each code cell's outputs: a stream's name, or the MIME types of the data."""
    return [[each.get("name") or "+".join(sorted(each.data)) for each in cell.outputs] for cell in code(notebook)]


def printed(notebook: NotebookNode) -> str:
    return "".join(each.text for cell in code(notebook) for each in cell.outputs if "text" in each)


def beginning(name: str) -> NotebookNode:
    """Return a cell that forgets all names, after it has said how much programs are optimized."""
    config = f"jax.config.update('jax_disable_most_optimizations', {name in SMALL_PROBLEMS})"
    return nbformat.v4.new_code_cell(f"import jax\n{config}\n%reset -f")


@pytest.fixture(scope="module")
def all_ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NotebookNode]:
    """All notebooks as they run one after the other in one kernel, which forgets every name of one before the next.

    The one that asks for several devices comes first: it has to before JAX is used.
    """
    folder = tmp_path_factory.mktemp("notebooks")
    for name in INPUTS:
        (folder / name).symlink_to(EXAMPLES / name)
    parts = {path.stem: [beginning(path.stem), *read(path).cells] for path in NOTEBOOKS}
    order = sorted(parts, key=lambda name: name != "several_devices")
    together = nbformat.v4.new_notebook(cells=[cell for name in order for cell in parts[name]])
    nbformat.write(together, folder / "all.ipynb")
    cells = iter(executed(folder / "all.ipynb", folder).cells)
    return {name: nbformat.v4.new_notebook(cells=[next(cells) for _ in parts[name]][1:]) for name in order}


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_is_shown_as_it_ran(notebook: Path, all_ran: dict[str, NotebookNode]):
    ran, shown = all_ran[notebook.stem], read(notebook)
    for fact in FACTS[notebook.stem]:
        assert fact in printed(ran)
        assert fact in printed(shown)
    assert kinds(shown) == kinds(ran)
    assert [cell.execution_count for cell in code(shown)] == list(range(1, len(code(shown)) + 1))
    assert str(EXAMPLES.parent) not in notebook.read_text("utf-8")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(notebook: Path):
    """Check the links ``[words](place)`` of Markdown cells."""
    text = "".join(cell.source for cell in read(notebook).cells if cell.cell_type == "markdown")
    places = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert all((notebook.parent / place).exists() for place in places), places


if __name__ == "__main__":
    for file in NOTEBOOKS:
        nbformat.write(executed(file, EXAMPLES), file)
