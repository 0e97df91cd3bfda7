"""The commands and what they share: help, and options from a TOML file."""

import tomllib
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from cyclopts import App, ArgumentCollection, Group, Parameter, validators
from cyclopts.config import Dict
from cyclopts.help import HelpPanel
from cyclopts.help.formatters import DefaultFormatter
from rich.console import Console, ConsoleOptions

from spap_jax import __version__
from spap_jax.cli.bench import bench
from spap_jax.cli.console import out
from spap_jax.cli.convert import convert
from spap_jax.cli.doctor import doctor
from spap_jax.cli.evaluate import eval_
from spap_jax.cli.finetune import finetune
from spap_jax.cli.plan import plan
from spap_jax.cli.prune import prune
from spap_jax.cli.push import push
from spap_jax.cli.report import report
from spap_jax.cli.write import write
from spap_jax.errors import UserError

BASIC: Mapping[str, Sequence[str]] = {
    "plan": ("mesh", "model_devices", "sparsity", "target", "effort", "sequences", "sequence_length", "json"),
    "prune": ("data", "output", "sparsity", "target", "eval", "effort", "sequences", "sequence_length", "overwrite"),
    "write": ("output", "data", "first_words", "prompts", "sequences", "length"),
    "finetune": (
        "data", "output", "teacher", "eval", "steps", "learning_rate", "sequences", "sequence_length", "full",
        "overwrite",
    ),
    "eval": (
        "data", "dense", "sequence_length", "sequences", "bos", "tasks", "task_path", "task_data", "limit", "json",
    ),
}  # fmt: skip
"""The options that everyone needs, in the order in which to learn them, for commands that have many more."""

FURTHER: Mapping[str, Sequence[str]] = {
    "Data and seed": ("bos", "held_out", "temperature", "seed"),
    "Choosing channels": ("attention_sparsity", "drop_blocks", "round_to", "allocation", "method", "schedule"),
    "Recovering weights": ("update", "rounds", "joint_passes", "joint_text_weight", "joint_last"),
    "Training": ("lora_rank", "lora_alpha", "weight_decay", "step_sequences", "check_every"),
    "Output and resuming": ("dtype", "resume"),
    "Memory and devices": ("devices", "model_devices", "batch_tokens", "process"),
}  # fmt: skip
"""The groups of the other options."""

_EVERY_COMMAND = Group("For every command", sort_key=len(FURTHER))
_GROUPS = {name: Group(title, sort_key=n) for n, (title, names) in enumerate(FURTHER.items()) for name in names}


class _HelpPage(DefaultFormatter):
    """Prints a command's groups of options, all or only the basic ones, and counts those left out."""

    def __init__(self, everything: bool) -> None:
        super().__init__()
        self._everything, self.left_out = everything, 0

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Prints one group, or counts its options."""
        if self._everything or panel.title not in FURTHER:
            super().__call__(console, options, panel)
        else:
            self.left_out += len(panel.entries)


class _Commands(App):
    def assemble_argument_collection(self, *, parse_docstring: bool = False, **how: Any) -> ArgumentCollection:
        """Returns a command's options, in the order and the groups of the tables above if they are to be shown."""
        options = super().assemble_argument_collection(parse_docstring=parse_docstring, **how)
        basic = BASIC.get(self.name[0])
        if basic is None or not parse_docstring:
            return options
        for option in options:
            if (name := option.field_info.name) in _GROUPS and name not in basic:
                option.parameter = Parameter.combine(option.parameter, Parameter(group=_GROUPS[name]))
        places = {name: place for place, name in enumerate((*basic, *_GROUPS))}
        return ArgumentCollection(sorted(options, key=lambda option: places.get(option.field_info.name, -1)))

    def help_print(
        self, tokens: Iterable[str] | str | None = None, *, console: Console | None = None, everything: bool = False
    ) -> None:
        """Prints the help of the command that the words name: short, or with every option."""
        self.help_formatter = page = _HelpPage(everything)
        super().help_print(tokens, console=console)
        if page.left_out:
            (console or self.console).print(f"--help-all shows {page.left_out} further options.")

    def generate_completion(self, **how: Any) -> str:
        """Returns the shell's completion script; in bash, completed folders end with a slash."""
        return super().generate_completion(**how).replace("complete -F ", "complete -o filenames -F ")


def _default_text(value: Any) -> str | None:
    """Formats a default for display; a switch has none to show, since it is off by default."""
    return None if value is None or isinstance(value, bool) else str(value)


app = _Commands(
    name="spap",
    version=f"spap-jax {__version__}",
    help="Make a language model smaller and faster in one run: remove MLP channels of LLaMA, Qwen, "
    "Mistral, Gemma 2 and 3, OLMo 2 and 3, Granite 3, Phi-4, GLM-4, SmolLM3 and OPT checkpoints, recover the weights "
    "of the rest, and write a checkpoint that stock tools load.",
    help_format="markdown",
    console=out,
    help_epilogue="The terms are explained in docs/reference.md.",
    # Switches are off by default, so they need no --no- form.
    default_parameter=Parameter(negative=(), show_default=_default_text),
)
app.suppress_keyboard_interrupt = app.meta.suppress_keyboard_interrupt = False  # it would exit without a word
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
            group=_EVERY_COMMAND,
        ),
    ] = None,
    help_all: Annotated[bool, Parameter(help="Show all options of the command.", group=_EVERY_COMMAND)] = False,
    debug: Annotated[
        bool, Parameter(help="Show the traceback of an error before its sentence.", group=_EVERY_COMMAND)
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
    """Reads a TOML file's options under the name of the command: the library ignores keys named like commands."""
    try:
        options = tomllib.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as TOML ({error}): correct it or leave out --config.") from error

    def pass_on(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        Dict(dict.fromkeys(commands, options), source=str(file))(app, commands, arguments)

    return pass_on


def _refuse_fractions(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Rejects fractions for options that accept whole numbers: the library would round 8.5 to 8."""
    for argument in arguments:
        if int in (argument.hint, *get_args(argument.hint)):
            for token in argument.tokens:
                try:
                    is_whole = all(abs(int(word)) < 2**32 for word in token.value.split(","))
                except ValueError:
                    is_whole = False
                if not is_whole:
                    source = "" if token.source == "cli" else f" as in {token.source}"
                    raise UserError(
                        f'{argument.name} takes a whole number below 2**32, not "{token.value}"{source}: write it in '
                        "digits."
                    )
