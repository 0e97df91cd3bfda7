"""What a model keeps, by the text that it is calibrated on: ``python -m benchmarks.texts --model DIR --text DIR``.

Every method is calibrated on every text: files of general text and of code, and what the model writes by itself, from
its start token, from the bundled beginnings, or from both, as without ``--data``. Each result is compared with the
dense model on text of several kinds, none of which it was calibrated on. A stopped call goes on where it was.
"""

import sys
import sysconfig
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

import spap_jax as spap
from benchmarks.quality import TEXTS
from benchmarks.real.runs import perform
from benchmarks.shared import METHODS, command, commit, rows_in, store, table
from spap_jax.evaluation import writing
from spap_jax.evaluation.perplexity import compare
from spap_jax.parallel.mesh import use_mesh
from spap_jax.parallel.placement import bytes_of
from spap_jax.settings import WriteSettings

app = App(name="texts", help=__doc__, suppress_keyboard_interrupt=False)

Several = Parameter(consume_multiple=True, negative=())

OWN = ("start", "openings", "own")
"""Texts of the model itself: from its start token alone, from the beginnings alone, and from both, the default."""

LENGTH, WINDOWS = 512, 8
"""Tokens of a sequence and of a window, and windows of each text that judges."""

ORDER = tuple(f"{method} on {text}" for text in ("own", "english", "start", "openings", "python")
              for method in ("spap, low effort", "fasp")) + tuple(
    f"spap, low effort on own+{text}" for text in ("english", "python"))  # fmt: skip


class Row(msgspec.Struct, frozen=True):
    """Divergence, in nats per token, of a model pruned by a method on a text, by name of the text that judges."""

    model: str
    run: str
    divergence: dict[str, float]
    commit: str
    date: str


@app.default
def main(
    *,
    model: Path,
    text: Path,
    run: Annotated[tuple[str, ...], Several] = ORDER,
    sparsity: float = 0.3,
    sequences: int = 64,
    work: Path = Path("build/texts"),
    output: Path = Path("out/texts"),
) -> None:
    """Prunes a model on each text and judges the results.

    Args:
        model: Folder of the model.
        text: Folder of the zoo's texts.
        run: Methods of ``benchmarks.quality`` with their texts, "METHOD on TEXT", where a text is english, python,
            start, openings or own, or several of them, "own+english", in equal parts.
        sparsity: Fraction of the MLP channels to remove.
        sequences: Sequences to calibrate on.
        work: Folder for texts and pruned models.
        output: Folder for the table; rows that it has are not measured again.
    """
    rows, dense = rows_in(output / "results.jsonl", Row), spap.load(model)
    judges = {
        name: spap.load_tokens(
            file, tokenizer=model, sequence_length=LENGTH, sequences=WINDOWS, role="evaluation"
        ).tokens
        for name, file in judges_in(text, work).items()
    }
    for asked in run:
        name = f"{asked}, {sequences} sequences"
        if (model.name, name) in {(row.model, row.run) for row in rows}:
            continue
        method, _, calibration = asked.partition(" on ")
        files = []
        for kind in calibration.split("+"):
            files.append(work / f"{model.name}-{kind}-{sequences}.jsonl" if kind in OWN else work / f"{kind}.txt")
            if kind in OWN and not files[-1].exists():
                write(dense, kind, sequences, files[-1])
        source = ",".join(f"{file}:{1 / len(files)}" for file in files) if len(files) > 1 else str(files[0])
        result = work / f"{model.name} {name}".replace(" ", "-").replace(",", "")
        options = METHODS[method] | {"sequences": sequences, "sequence_length": LENGTH, "sparsity": sparsity}
        words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        perform(str(model), [*words, "--data", source], result)
        pruned = spap.load(result)
        found = {judge: compare(dense, pruned, tokens).divergence for judge, tokens in judges.items()}
        rows.append(Row(model.name, name, found, commit(), datetime.now(UTC).isoformat(timespec="seconds")))
        store(output / "results.jsonl", rows)
        print(f"{name}: {', '.join(f'{judge} {value:.3f}' for judge, value in found.items())}", flush=True)
    (output / "README.md").write_text(markdown(rows, command("benchmarks.texts", sys.argv[1:])), encoding="utf-8")


def judges_in(text: Path, work: Path) -> dict[str, Path]:
    """Writes the two texts that calibrate, english and python, and returns those that judge, by name."""
    english = (text / TEXTS["english"][0]).read_text(encoding="utf-8")
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    python = ["\n\n".join(file.read_text(encoding="utf-8") for file in library[half::2]) for half in (0, 1)]
    middle = english.index("\n\n", len(english) // 2)
    work.mkdir(parents=True, exist_ok=True)
    halves = {"english": (english[:middle], english[middle:]), "python": python}
    for name, (first, second) in halves.items():
        (work / f"{name}.txt").write_text(first, encoding="utf-8")
        (work / f"{name}-judge.txt").write_text(second, encoding="utf-8")
    return {
        "WikiText-2": text / TEXTS["english"][1],
        "English": work / "english-judge.txt",
        "Python": work / "python-judge.txt",
        "stories": text / TEXTS["stories"][1],
    }


def write(model: spap.Model, kind: str, sequences: int, file: Path) -> None:
    """Lets the model write enough text to calibrate on."""
    settings: WriteSettings = writing.settings_for(model, sequences, LENGTH)
    asked = writing.prepare(model, settings, None, None)
    begun = [given for given in asked.beginnings if kind == "own" or (len(given) == 1) == (kind == "start")]
    with use_mesh(None, None, bytes_of(model.params)):
        rows = [row for batch in writing.write_batches(model, asked._replace(beginnings=begun)) for row in batch]
    file.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))


def markdown(rows: Sequence[Row], asked: str) -> str:
    """Returns the page."""
    judges = list(rows[0].divergence)
    lines = [[row.model, row.run, *(f"{row.divergence[judge]:.3f}" for judge in judges)] for row in rows]
    head = f"# What is kept, by the text of the calibration\n\nDivergence, nats per token.\n\n```\n{asked}\n```"
    return f"{head}\n\n{table(['model', 'method and text', *judges], lines, ['method and text'])}\n"


if __name__ == "__main__":
    try:
        app()
    except spap.UserError as error:
        sys.exit(f"texts: {error}")
    except KeyboardInterrupt:
        sys.exit("texts: interrupted; the same command goes on from here.")
