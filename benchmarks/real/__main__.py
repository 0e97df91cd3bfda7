"""``python -m benchmarks.real``."""

import hashlib
import itertools
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

import spap_jax as spap
from benchmarks import real
from benchmarks.real import page
from benchmarks.real.obtain import obtain
from benchmarks.real.runs import METHODS, SPARSITIES, Row, command_of, perform, row_of
from benchmarks.real.task_data import obtain_task_data
from benchmarks.real.zero_shot import Answers, answer
from benchmarks.shared import command as command_line
from benchmarks.shared import commit, rows_in, store

app = App(name="real", help=real.__doc__, suppress_keyboard_interrupt=False)

Several = Parameter(consume_multiple=True, negative=())


@app.default
def main(
    *,
    model: str = "SmolLM2-135M-Instruct",
    calibration: str = "c4",
    evaluation: Annotated[tuple[str, ...], Several] = ("wikitext2", "c4"),
    sparsity: Annotated[tuple[float, ...], Several] = SPARSITIES,
    method: Annotated[tuple[str, ...], Several] = METHODS,
    sequences: int = 128,
    sequence_length: int = 512,
    windows: int = 24,
    examples: int = 1000,
    work: Path = Path("build/real"),
    output: Path = Path("out/real"),
) -> None:
    """Prunes a real model with every method, and writes the table of quality, time, memory and speed.

    Args:
        model: Folder or hub id of the model, or the name of one that is made from packages: SmolLM2-135M-Instruct or
            gemma-3-270m.
        calibration: Calibration data, as in ``spap prune --data``.
        evaluation: Data for judging, as in ``spap eval --data``.
        sparsity: Fractions of the MLP channels to remove, in the order in which they are run.
        method: Names of methods, in the order in which they are run.
        sequences: Number of calibration sequences.
        sequence_length: Tokens in a calibration sequence.
        windows: Windows of up to 2048 tokens of each text; 0 takes all.
        examples: Examples of each zero-shot task, from its start; 0 leaves the tasks out.
        work: Folder for the models.
        output: Folder for the table; rows that it has are not measured again.
    """
    runs = [
        (cut, way, command_of(way, cut, calibration, sequences, sequence_length))
        for cut, way in itertools.product(sparsity, method)
    ]
    name = obtain(model, work)
    dense = spap.load(name)
    length = min(2048, dense.config.positions)
    asked = {"tokenizer": name, "role": "evaluation", "sequences": windows or None, "sequence_length": length}
    if len({Path(data).stem for data in evaluation}) < len(evaluation):
        raise spap.UserError("two texts for --evaluation have the same name, which is all the table says: rename one.")
    texts = {
        Path(data).stem: spap.load_tokens(data, vocabulary=dense.config.vocabulary, **asked).tokens
        for data in evaluation
    }
    rows, answers = rows_in(output / "results.jsonl", Row), rows_in(output / "answers.jsonl", Answers)
    short = Path(name).name

    def ask(command: str, folder: str | Path) -> None:
        if examples and (short, command, examples) not in {each.key for each in answers}:
            data = obtain_task_data(work / "tasks")
            answers.extend(answer(short, command, spap.load(folder), data, examples))
            store(output / "answers.jsonl", answers)

    ask("", name)
    for cut, way, words in runs:
        command = " ".join(Path(word).name if "/" in word else word for word in words)
        measured = (short, command, windows, tuple(texts)) in {row.key for row in rows}
        if measured and (not examples or (short, command, examples) in {each.key for each in answers}):
            print(f"{cut:.0%}, {way}: measured already, in {output}", flush=True)
            continue
        # A folder is of one commit, command, model and data, since a finished one is not pruned again.
        given = (str(Path(word).resolve()) if Path(word).exists() else word for word in (name, *words))
        which = "\0".join((commit(), *given))
        folder = work / f"{short}-{cut:g}-{hashlib.sha256(which.encode()).hexdigest()[:8]}"
        perform(name, words, folder)
        if not measured:
            rows.append(row_of(short, cut, way, command, dense, folder, texts, windows, commit()))
            store(output / "results.jsonl", rows)
        ask(command, folder)
        row = next(row for row in rows if row.key == (short, command, windows, tuple(texts)))
        alike = [each for each in answers if (each.model, each.limit) == (short, examples)]
        _write_page(output, [other for other in rows if other.judged_like(row)], alike)
        quality = ", ".join(f"{text} {judged.pruned:.2f}" for text, judged in row.texts.items())
        print(f"{cut:.0%}, {way}: perplexity {quality}", flush=True)


def _write_page(folder: Path, rows: list[Row], answers: list[Answers]) -> None:
    command = command_line("benchmarks.real", sys.argv[1:])
    text = page.markdown(rows, answers, command, page.draw(folder, rows, answers))
    (folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        app()
    except spap.UserError as error:
        sys.exit(f"real: {error}")
    except KeyboardInterrupt:
        sys.exit("real: interrupted; the same command goes on from here.")
