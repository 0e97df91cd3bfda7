"""Rendered output of ``--help`` and ``--help-all``."""

import re
import shlex

import pytest
from commands import spap
from cyclopts.argument import Argument
from rich.console import Console

from spap_jax.cli.app import BASIC, FURTHER, app

COMMANDS = [name for name in app if not name.startswith("-")]
NO_EFFECT = "eval prompts json process data dense tasks task_path task_data other teacher mesh finetune"
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


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_an_option_is_short_and_says_its_default(command: str):
    """What it does and the default; why and how much stands in the documentation."""
    for option in options(command):
        text = option.parameter.help or ""
        assert 0 < len(text) <= 160, (option.name, len(text))
        if option.field_info.default is None and option.field_info.name not in NO_EFFECT.split():
            assert "By default" in text, option.name


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
    assert len(everything) <= 32
    assert set(some) <= set(everything)
    further = len(everything) - len(some)
    assert short.endswith(f"--help-all shows {further} further options.\n") == bool(further)
    assert "further options" not in long
    for flag in ("--help", "--help-all"):
        assert max(map(len, shown(capsys, command, flag, columns=80)[1].splitlines())) <= 80


def test_all_options_of_prune_in_their_groups(capsys):
    assert shown(capsys, "prune", "--help")[0][:3] == ["--data", "--output", "--sparsity"]
    titles = re.findall(r"^╭─ (.*?) ─+╮$", shown(capsys, "prune", "--help-all")[1], re.MULTILINE)
    groups = [title for title in FURTHER if title != "Training"]
    assert titles == ["Arguments", "Parameters", *groups, "For every command"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_two_examples_that_are_understood(command: str):
    lines = re.findall(r"^ *(spap .+)$", app[command].help, re.MULTILINE)
    assert len(lines) >= 2
    for line in lines:
        assert len(line) <= 78
        words = shlex.split(line.partition(" > ")[0])
        app[words[1]].parse_args(words[2:], exit_on_error=False, print_error=False)
