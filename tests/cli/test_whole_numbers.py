"""Options that count require whole numbers, on the command line and in a file; nothing is rounded."""

from pathlib import Path

import pytest
from commands import sentence, spap

from spap_jax.cli.app import app

OPTIONS = [
    (command, argument.name)
    for command in app
    if not command.startswith("-")
    for argument in app[command].assemble_argument_collection()
    if argument.hint in (int, int | None)
]


def test_every_option_that_counts(tmp_path: Path, capsys):
    assert {("prune", "--sequences"), ("eval", "--limit"), ("bench", "--new"), ("plan", "--seed")} < set(OPTIONS)
    file = tmp_path / "settings.toml"
    for command, option in OPTIONS:
        file.write_text(f"{option.removeprefix('--')} = 8.5\n")
        for words in ((option, "8.5"), ("--config", file)):
            assert sentence(spap(capsys, command, *words)).startswith(f"{option} takes a whole number")


@pytest.mark.parametrize("value", ["8.0", "nan", "", "none", "9" * 5000])
def test_other_ways_to_write_a_number(value: str, tmp_path: Path, capsys):
    assert "--sequences takes a whole number" in sentence(spap(capsys, "prune", f"--sequences={value}"))
    (tmp_path / "settings.toml").write_text(f'sequences = "{value}"\n')
    said = sentence(spap(capsys, "prune", "--config", tmp_path / "settings.toml"))
    assert "--sequences takes a whole number" in said
    # What a refused file held is not there when other code of the process asks the commands.
    app.parse_args(["eval", "model", "--data", "text"], exit_on_error=False, print_error=False)
