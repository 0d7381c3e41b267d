# SPDX-License-Identifier: MIT
"""What all commands are: loaded when they are called, with -q and -v, and helpful about typos.

Workload: `pybitmap --help` and completion ask what there is, many times a day; they import none of
the commands, nor what these need.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any

import click

from ..sizes import SYNTAX
from .common import QUIET, VERBOSE, VERBOSITY

#: In the environment: a shell asks what completes a line; see completion.py.
COMPLETE_VAR = "_PYBITMAP_COMPLETE"

#: By name: the module that has it, as ``NAME_command``, and the beginning of its help.
COMMANDS = {
    "info": ("bitmaps", "List the bitmaps of TARGET."),
    "add": ("bitmaps", "Add a bitmap, clean, to TARGET."),
    "remove": ("bitmaps", "Remove bitmaps from TARGET."),
    "clear": ("bitmaps", "Make everything clean in bitmaps."),
    "enable": ("bitmaps", "Let bitmaps record writes, when a program opens them."),
    "disable": ("bitmaps", "Let bitmaps record no writes; they keep what is dirty."),
    "merge": ("bitmaps", "Mark in bitmap NAME what is dirty in the SOURCE bitmaps."),
    "take": ("bitmaps", "Move what is dirty to a new bitmap, to be copied."),
    "put-back": ("bitmaps", "Undo a take: what is dirty is marked where it was."),
    "resize": ("bitmaps", "Let bitmaps of a local store follow a disk's size."),
    "dump": ("bitmaps", "Print the dirty extents of a bitmap."),
    "convert": ("convert", "Convert lists of dirty extents, and bitmaps."),
    "check": ("bitmaps", "Check the bitmaps of TARGET."),
    "repair": ("bitmaps", "Make inconsistent bitmaps usable: all dirty."),
    "rescue": ("bitmaps", "Open an image that is refused for its bitmaps."),
    "backup": ("backup_run", "Copy disks into a backup directory, by increments."),
    "verify": ("backup", "Check that each point of a backup can be restored."),
    "restore": ("backup", "Write a disk as it was at a point of a backup."),
    "list": ("backup", "List the points of a backup."),
    "prune": ("backup", "Take points out of a backup, and delete their files."),
    "replay": ("replay", "Replay a trace of block writes and show what is dirty."),
    "fleet": ("fleet", "Ask what many disks have to copy."),
    "serve": ("serve", "Serve named bitmaps over QEMU's monitor protocol, QMP."),
    "completion": ("completion", "Print what makes a shell complete commands and names."),
}


def _set_verbosity(level: int, ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and ctx.meta.setdefault(VERBOSITY, level) != level:
        raise click.UsageError("Give either -q or -v, not both.", ctx)


def _flag(level: int, short: str, long: str, help: str) -> click.Option:
    callback = partial(_set_verbosity, level)
    return click.Option(
        [short, long], is_flag=True, expose_value=False, callback=callback, help=help
    )


def _flags() -> list[click.Parameter]:
    return [
        _flag(QUIET, "-q", "--quiet", "Only errors on standard error: no progress, no notes."),
        _flag(VERBOSE, "-v", "--verbose", "Say on standard error what is being done."),
    ]


class Command(click.Command):
    """A command with -q and -v, which says in its help what a SIZE is if it takes any."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.params += _flags()

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if any("SIZE" in f"{each.metavar} {getattr(each, 'help', '')}" for each in self.params):
            formatter.write_paragraph()
            formatter.write_text(SYNTAX)
        super().format_epilog(ctx, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing and args and self._takes_value(args[-1]):
            args = args[:-1]  # what is to be completed; without it, click would parse nothing
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise _no_such_option(error.option_name, words, self, ctx) from None
        except click.BadParameter:
            # -granularity is -g with a value, for click
            for word in words:
                if f"-{word}" in _options(self, ctx):
                    raise _no_such_option(word, words, self, ctx) from None
            raise

    def _takes_value(self, word: str) -> bool:
        options = (each for each in self.params if isinstance(each, click.Option))
        return any(word in each.opts and not each.is_flag for each in options)


#: Decorator of the function that a command runs.
command: Callable[..., Callable[[Callable[..., Any]], Command]] = partial(
    click.command, cls=Command
)


class Group(click.Group):
    """Commands, each loaded when it is called; by default :data:`COMMANDS`.

    :param known: they, as there; a group that is a command itself has -q and -v
    """

    def __init__(
        self, *args: Any, known: dict[str, tuple[str, str]] | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._known = COMMANDS if known is None else known
        if known is not None:
            self.params += _flags()

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._known)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self._known:
            return None
        module = import_module(f".{self._known[name][0]}", __package__)
        found: click.Command = getattr(module, f"{name.replace('-', '_')}_command")
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, words) for name, (_, words) in self._known.items()])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            refusal = _no_such_option(error.option_name, words, self, ctx)
            behind = "Options of a command stand behind its name."
            raise click.UsageError(f"{refusal.message} {behind}", ctx) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self._known and not ctx.resilient_parsing:
            raise click.UsageError(
                f"No such command {args[0]!r}{did_you_mean(args[0], self._known)}", ctx
            )
        return super().resolve_command(ctx, args)


def did_you_mean(word: str, known: Collection[str]) -> str:
    """The end of a sentence on a word that is not known: which one is the nearest, if any is."""
    nearest = get_close_matches(word.lower(), known, 1)
    return f"; did you mean {nearest[0]!r}?" if nearest else "."


def _options(command: click.Command, ctx: click.Context) -> list[str]:
    """Long ones."""
    names = [name for param in command.get_params(ctx) for name in param.opts]
    return [name for name in names if name.startswith("--")]


def _no_such_option(
    name: str, words: Sequence[str], command: click.Command, ctx: click.Context
) -> click.UsageError:
    """With the option that was meant, also where a dash was forgotten: -json."""
    if not name.startswith("--"):  # of several letters, click takes each for an option
        name = next((word for word in words if word.startswith(name[:2])), name)
    name = name.partition("=")[0]
    word = name if name.startswith("--") or len(name) == 2 else f"-{name}"
    meant = did_you_mean(word, _options(command, ctx)) if len(word) > 2 else "."
    return click.UsageError(f"No such option {name!r}{meant}", ctx)
