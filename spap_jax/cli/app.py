"""The commands and what they share: help, and options from a TOML file."""

import functools
import tomllib
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from cyclopts import App, ArgumentCollection, Parameter, validators
from cyclopts.config import Dict
from rich.console import Console

from spap_jax import __version__
from spap_jax.cli.bench import bench
from spap_jax.cli.convert import convert
from spap_jax.cli.doctor import doctor
from spap_jax.cli.evaluate import eval_
from spap_jax.cli.finetune import finetune
from spap_jax.cli.help import EVERY_COMMAND, HelpPage, arranged, default_words
from spap_jax.cli.plan import plan
from spap_jax.cli.prune import prune
from spap_jax.cli.push import push
from spap_jax.cli.report import report
from spap_jax.cli.standard_streams import pages
from spap_jax.cli.write import write
from spap_jax.errors import UserError

ABOVE = 2**32
"""Whole numbers must be below this bound: JAX's seeds have no more bits, and no size needs more."""


class _Commands(App):
    def assemble_argument_collection(self, *, parse_docstring: bool = False, **how: Any) -> ArgumentCollection:
        """Returns a command's options, arranged if they are to be shown, which is when docstrings are parsed."""
        options = super().assemble_argument_collection(parse_docstring=parse_docstring, **how)
        return arranged(self.name[0], options) if parse_docstring else options

    def help_print(
        self, tokens: Iterable[str] | str | None = None, *, console: Console | None = None, everything: bool = False
    ) -> None:
        """Prints the help of the command that the words name: short, or with every option."""
        self.help_formatter = page = HelpPage(everything)
        super().help_print(tokens, console=console)
        if page.left_out:
            (console or self.console).print(f"--help-all shows {page.left_out} further options.")

    def generate_completion(self, **how: Any) -> str:
        """Returns the shell's completion script; in bash, completed folders end with a slash."""
        return super().generate_completion(**how).replace("complete -F ", "complete -o filenames -F ")


app = _Commands(
    name="spap",
    version=f"spap-jax {__version__}",
    help="Make a language model smaller and faster in one run: remove MLP channels of LLaMA, Qwen, "
    "Mistral, Gemma 3, OLMo 2, SmolLM3 and OPT checkpoints, recover the weights of the rest, and write a checkpoint "
    "that stock tools load.",
    help_format="markdown",
    console=pages,
    help_epilogue="The terms are explained in docs/reference.md.",
    # Switches are off by default, so they need no --no- form.
    default_parameter=Parameter(negative=(), show_default=default_words),
)
for each in (app, app.meta):
    each.suppress_keyboard_interrupt = False  # the library would exit without a word
for place, command in enumerate((plan, write, prune, finetune, eval_, bench, report, convert, push, doctor)):
    app.command(command, sort_key=place)  # in order of use
app.register_install_completion_command(help="Make the shell complete commands and options with the tab key.")


@app.meta.default
def launcher(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[
        Path | None,
        Parameter(
            help="TOML file with any of the command's options. Options on the command line take precedence.",
            validator=validators.Path(exists=True, dir_okay=False),
            group=EVERY_COMMAND,
        ),
    ] = None,
    help_all: Annotated[bool, Parameter(help="Show all options of the command.", group=EVERY_COMMAND)] = False,
    debug: Annotated[
        bool, Parameter(help="Show the traceback of an error before its sentence.", group=EVERY_COMMAND)
    ] = False,
) -> None:
    """Reads --config before the command's own options, which take precedence."""
    try:
        if help_all:
            app.help_print(words, everything=True)
            return
        app.config = (_refuse_fractions,) if config is None else (_options_of(config), _refuse_fractions)
        app(words, exit_on_error=False, print_error=False, result_action="return_value")
    except BaseException:
        if debug:
            traceback.print_exc()
        raise
    finally:
        app.config = ()  # the file is of this call, not of the process


def _options_of(file: Path) -> Callable[[App, tuple[str, ...], ArgumentCollection], None]:
    """Reads the options in a TOML file, for whichever command was typed.

    They are passed on under that command's name: the library ignores top-level keys of a file that are names of
    commands, and eval is both a command and an option of two others.

    Raises:
        UserError: it is not TOML; the library's own message does not name the file.
    """
    try:
        options = tomllib.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as TOML ({error}): correct it or leave out --config.") from error

    def pass_on(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        nested = functools.reduce(lambda inner, command: {command: inner}, reversed(commands), options)
        Dict(nested, source=str(file))(app, commands, arguments)

    return pass_on


def _refuse_fractions(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Rejects fractions for options that accept whole numbers: the library would round 8.5 to 8.

    The library calls this for every command after reading its words and its file, before converting them to numbers.

    Raises:
        UserError: a value is not a whole number, or is too large.
    """
    for argument in arguments:
        if int in (argument.hint, *get_args(argument.hint)):
            for token in argument.tokens:
                try:
                    number = int(token.value)
                except ValueError:
                    source = "" if token.source == "cli" else f" as in {token.source}"
                    raise UserError(
                        f'{argument.name} takes a whole number, not "{token.value}"{source}: write it in digits.'
                    ) from None
                if abs(number) >= ABOVE:
                    raise UserError(f"{argument.name} takes whole numbers below {ABOVE}: give a smaller one.")


def launch(words: list[str]) -> None:
    """Runs the command that the words name."""
    app.meta(words, exit_on_error=False, print_error=False, result_action="return_value")


def option_names(words: Sequence[str]) -> set[str]:
    """Returns the options, such as "--seed", of the command in a command line; none if there is no command."""
    _, (*_, named), _ = app.parse_commands(list(words))
    if named is app:
        return set()
    return {name for argument in named.assemble_argument_collection() for name in argument.names}
