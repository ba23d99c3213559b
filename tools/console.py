"""Consoles, progress and error lines of the command line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from halp_fx.errors import HalpError

__all__ = ["DebugOption", "HalpCommands", "err", "out", "progress_bars"]

_DEBUG = "halp_fx.debug"


_PIPED_WIDTH = 160  # columns of a table that no terminal limits


def out() -> Console:
    """Results go to standard output; made on demand, so that redirection is respected."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    return console


def err() -> Console:
    """Progress, notes and errors go to standard error."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def _set_debug(context: typer.Context, value: bool) -> bool:
    if value:
        context.meta[_DEBUG] = True
    return value


DebugOption = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error.", callback=_set_debug),
]


class HalpCommands(typer.core.TyperGroup):
    """Commands that report a `HalpError` as one red line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HalpError as error:
            if ctx.meta.get(_DEBUG):
                raise
            message = " ".join(str(error).split())
            err().print(Text(f"error: {message}", style="red"))
            raise typer.Exit(2) from error


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A callback `(stage, done, total)` that draws one bar a stage on standard error.

    A total of 0 or less means that the amount of work is not known. A stage is over when the next
    one begins, or when the block ends without an error.
    """
    columns = (
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=err())
    tasks: dict[str, Any] = {}

    def finish() -> None:
        for task in progress.tasks:
            if not task.finished:
                progress.update(task.id, completed=task.total or 1, total=task.total or 1)

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            finish()
            progress.start()  # not before: a mistake in the arguments draws nothing
            tasks[stage] = progress.add_task(stage, total=None)
        progress.update(tasks[stage], completed=done, total=total if total > 0 else None)

    try:
        yield report
        finish()
    finally:
        if tasks:
            progress.stop()
