"""What every group of commands shares: headings in ``--help``, and an end without noise when a pipe closes."""

import inspect
import os
import sys
from itertools import groupby
from typing import Any

from typer import Exit
from typer.core import TyperGroup

BUILD = "Build a corpus"
LOOK = "Look into a corpus"
KEEP = "Keep a corpus in order"
TRAIN = "Train"
MEASURE = "Measure"
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
# Of commands that stand under none.
_OTHERS = "Commands"
_HEADINGS = (BUILD, LOOK, KEEP, TRAIN, MEASURE, _OTHERS)
# What a shell reports for a process that SIGPIPE ended.
_PIPE_CLOSED = 141


class CommandGroup(TyperGroup):
    """A group whose help lists the commands by their ``rich_help_panel`` and cuts no description."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the lists of commands; typer's own are one list, each description cut to a line."""
        commands = [(name, command) for name, command in self.commands.items() if not command.hidden]
        width = max(len(name) for name, _ in commands)
        commands.sort(key=lambda item: _HEADINGS.index(_panel(item[1])))
        for heading, members in groupby(commands, key=lambda item: _panel(item[1])):
            with formatter.section(heading):
                formatter.write_dl(
                    [(f"{name:<{width}}", _first_sentence(command)) for name, command in members]
                )

    def invoke(self, ctx: Any) -> Any:
        """Run the command; if it only reads, a closed pipe (``| head``) is not an error."""
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            # Python flushes once more at exit, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            command = self.commands.get(ctx.invoked_subcommand)
            only_looks = command is not None and _panel(command) == LOOK
            raise Exit(0 if only_looks else _PIPE_CLOSED) from None


def _panel(command: Any) -> str:
    return command.rich_help_panel or _OTHERS


def _first_sentence(command: Any) -> str:
    paragraph = inspect.cleandoc(command.help or "").partition("\n\n")[0]
    sentence = " ".join(paragraph.split()).partition(". ")[0]
    return sentence.removesuffix(".") + "."
