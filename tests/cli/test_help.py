"""Rendered output of ``--help`` and ``--help-all``."""

import re
import shlex
from pathlib import Path

import pytest
from commands import STORIES, sentence, spap
from cyclopts.argument import Argument
from rich.console import Console

from spap_jax.cli.app import app
from spap_jax.cli.help import BASIC, FURTHER

COMMANDS = [name for name in app if not name.startswith("-")]
WITHOUT_DEFAULT = {
    "eval",
    "prompts",
    "json",
    "finetune",
    "coordinator",
    "processes",
    "process_id",
    "data",
    "tasks",
    "task_path",
    "other",
}
"""Options that have no effect unless they are given."""


def options(command: str) -> list[Argument]:
    return [each for each in app[command].assemble_argument_collection(parse_docstring=True) if each.show]


def shown(capsys: pytest.CaptureFixture[str], *words: str, columns: int = 200) -> tuple[list[str], str]:
    """Returns the options that begin a line of a help page, and the page, from a terminal wide enough for all names."""
    app.console = Console(width=columns)
    said = spap(capsys, *words)
    app.console = None
    assert (said.code, said.err) == (0, "")
    return re.findall(r"^│ [* ]*(--[\w-]+)", said.out, re.MULTILINE), said.out


@pytest.mark.parametrize("command", BASIC)
def test_every_option_has_its_place(command: str):
    """Every option, new ones included, is either a basic one or in a group."""
    known = {*BASIC[command], *(name for names in FURTHER.values() for name in names)}
    names = [each.field_info.name for each in options(command) if each.index is None]
    assert [name for name in names if name not in known] == []
    assert [name for name in BASIC[command] if name not in names] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_short_help_has_few_options_and_counts_the_others(command: str, capsys):
    some, short = shown(capsys, command, "--help")
    everything, long = shown(capsys, command, "--help-all")
    assert len(some) <= 13  # including --config, --debug and --help-all
    assert set(some) <= set(everything)
    further = len(everything) - len(some)
    assert short.endswith(f"--help-all shows {further} further options.\n") == bool(further)
    assert "further options" not in long


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
@pytest.mark.parametrize("command", COMMANDS)
def test_it_fits_a_terminal(command: str, flag: str, capsys):
    assert max(map(len, shown(capsys, command, flag, columns=80)[1].splitlines())) <= 80


def test_the_short_help_begins_with_what_is_needed(capsys):
    assert shown(capsys, "prune", "--help")[0][:3] == ["--data", "--output", "--sparsity"]


def test_all_options_in_their_groups(capsys):
    _, text = shown(capsys, "prune", "--help-all")
    titles = re.findall(r"^╭─ (.*?) ─+╮$", text, re.MULTILINE)
    groups = [title for title in FURTHER if title != "Training"]
    assert titles == ["Arguments", "Parameters", *groups, "For every command"]
    assert set(groups) & set(shown(capsys, "prune", "--help")[1].split("─")) == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_default_that_depends_is_told_in_words(command: str):
    silent = [
        each.field_info.name
        for each in options(command)
        if each.field_info.default is None and "By default" not in (each.parameter.help or "")
    ]
    assert set(silent) <= WITHOUT_DEFAULT


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "doctor"])
def test_the_examples_are_understood(command: str):
    lines = re.findall(r"^ *(spap .+)$", app[command].help, re.MULTILINE)
    assert lines
    for line in lines:
        assert len(line) <= 78
        app.parse_args(shlex.split(line)[1:], exit_on_error=False, print_error=False)


@pytest.mark.parametrize(
    "words", [("--calibration", "none.txt"), ("--calibration=none.txt",), ("--config", "old.toml")]
)
def test_an_earlier_name_of_the_data(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("old.toml").write_text('calibration = "none.txt"\n')
    assert "none.txt" in sentence(spap(capsys, "prune", STORIES, "--output", "out", *words))


def test_an_earlier_name_of_the_data_is_not_shown(capsys):
    assert "--calibration" not in shown(capsys, "prune", "--help-all")[1]
