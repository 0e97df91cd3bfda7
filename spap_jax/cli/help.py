"""The content of ``--help``: the options that everyone needs, and with ``--help-all`` the others in groups."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cyclopts import Group, Parameter
from cyclopts.argument import ArgumentCollection
from cyclopts.help.formatters import DefaultFormatter

if TYPE_CHECKING:
    from cyclopts.help import HelpPanel
    from rich.console import Console, ConsoleOptions

BASIC: Mapping[str, Sequence[str]] = {
    "plan": ("mesh", "model_devices", "sparsity", "effort", "sequences", "sequence_length", "round_to", "finetune",
             "json", "compile"),
    "prune": ("data", "output", "sparsity", "eval", "effort", "sequences", "sequence_length", "round_to", "overwrite"),
    "finetune": (
        "data", "output", "teacher", "eval", "steps", "learning_rate", "sequences", "sequence_length", "full",
        "overwrite",
    ),
    "write": ("output", "data", "first_words", "prompts", "sequences", "length"),
    "eval": ("data", "sequence_length", "sequences", "bos", "tasks", "task_path", "limit", "json"),
}  # fmt: skip
"""The options that everyone needs, in the order in which to learn them, for commands that have many more."""

FURTHER: Mapping[str, Sequence[str]] = {
    "Data and seed": ("bos", "held_out", "sampled", "temperature", "seed"),
    "Choosing channels": (
        "attention_sparsity", "allocation", "method", "schedule", "ridge", "correction", "penalty", "penalty_stages",
        "swap_rounds",
    ),
    "Recovering weights": (
        "update", "rounds", "steps", "learning_rate", "step_tokens",
        "joint_passes", "joint_text_weight", "joint_weights", "joint_last", "joint_blocks", "joint_tokens",
        "joint_learning_rate",
    ),
    "Training": ("lora_rank", "lora_alpha", "weight_decay", "step_sequences", "check_every"),
    "Output and resuming": ("dtype", "resume"),
    "Memory and devices": (
        "devices", "model_devices", "batch_tokens", "stream_dtype", "moment_dtype", "compute_dtype", "remat",
    ),
    "Several processes": ("coordinator", "processes", "process_id"),
}  # fmt: skip
"""The groups of the other options."""

EVERY_COMMAND = Group("For every command", sort_key=len(FURTHER))

_GROUPS = {name: Group(title, sort_key=n) for n, (title, names) in enumerate(FURTHER.items()) for name in names}


def arranged(command: str, options: ArgumentCollection) -> ArgumentCollection:
    """Arranges the options of a command as its help, its page and the shell's completion show them.

    Args:
        command: Name of the command.
        options: Its options, as its function declares them.

    Returns:
        The same options in the order of the tables above, each in its group, without the names that are accepted only
        for compatibility with older command lines.
    """
    basic = BASIC.get(command)
    for option in options:
        name, parameter = option.field_info.name, option.parameter
        if parameter.alias:
            shown = [word for word in parameter.name or () if word not in parameter.alias]
            option.parameter = Parameter.combine(parameter, Parameter(name=shown, alias=()))
        if basic and name in _GROUPS and name not in basic:
            option.parameter = Parameter.combine(option.parameter, Parameter(group=_GROUPS[name]))
    if basic is None:
        return options
    order = (*basic, *_GROUPS)
    places = {name: place for place, name in enumerate(order)}
    return ArgumentCollection(sorted(options, key=lambda option: places.get(option.field_info.name, -1)))


def default_words(value: Any) -> str | None:
    """Formats a default for display; a switch has none to show, since it is off by default."""
    return None if value is None or isinstance(value, bool) else str(value)


class HelpPage(DefaultFormatter):
    """Prints a command's groups of options: all of them, or those that everyone needs.

    Attributes:
        left_out: Number of options that were not printed.
    """

    def __init__(self, everything: bool) -> None:
        super().__init__()
        self._everything, self.left_out = everything, 0

    def __call__(self, console: "Console", options: "ConsoleOptions", panel: "HelpPanel") -> None:
        """Prints one group, or counts its options."""
        if self._everything or panel.title not in FURTHER:
            super().__call__(console, options, panel)
        else:
            self.left_out += len(panel.entries)
