"""Options that count require whole numbers, on the command line and in a file; nothing is rounded."""

from pathlib import Path

import pytest
from commands import sentence, spap

from spap_jax.cli.app import app

COMMANDS = ("plan", "prune", "finetune", "eval", "bench")
OPTIONS = [
    (command, argument.name)
    for command in COMMANDS
    for argument in app[command].assemble_argument_collection()
    if argument.hint in (int, int | None)
]


def test_the_options_are_found():
    assert len(OPTIONS) > 40
    assert {("prune", "--sequences"), ("prune", "--joint-blocks"), ("eval", "--limit"), ("bench", "--new")} < set(
        OPTIONS
    )


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_every_option_that_counts(command: str, option: str, tmp_path: Path, capsys):
    assert sentence(spap(capsys, command, option, "8.5")) == (
        f'{option} takes a whole number, not "8.5": write it in digits.'
    )
    file = tmp_path / "settings.toml"
    file.write_text(f"{option.removeprefix('--')} = 8.5\n")
    assert sentence(spap(capsys, command, "--config", file)) == (
        f'{option} takes a whole number, not "8.5" as in {file}: write it in digits.'
    )


@pytest.mark.parametrize("value", ["8.0", "1e3", "1.e3", "0x10", "inf", "nan", "", "none", "8,5"])
def test_other_ways_to_write_a_number(value: str, capsys):
    said = sentence(spap(capsys, "prune", f"--sequences={value}"))
    assert said == f'--sequences takes a whole number, not "{value}": write it in digits.'


@pytest.mark.parametrize("value", ["true", "1e3", '"many"'])
def test_other_kinds_of_values_in_a_file(value: str, tmp_path: Path, capsys):
    (tmp_path / "settings.toml").write_text(f"sequences = {value}\n")
    said = sentence(spap(capsys, "prune", "--config", tmp_path / "settings.toml"))
    assert said.startswith("--sequences takes a whole number, not ")


def test_a_file_is_forgotten_with_the_command(tmp_path: Path, capsys):
    """What a refused file held is not there when other code of the process asks the commands."""
    (tmp_path / "settings.toml").write_text('sequences = "many"\n')
    sentence(spap(capsys, "prune", "--config", tmp_path / "settings.toml"))
    app.parse_args(["eval", "model", "--data", "text"], exit_on_error=False, print_error=False)
