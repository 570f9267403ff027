"""What a person sees: tables, sizes, times and errors. Machines get JSON."""

import datetime
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDE = 200  # of what is not a terminal: a table that is piped must not lose its columns


def out() -> Console:
    """Standard output as it is now: tests and pipes replace it."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)


def say(text: str) -> None:
    """One line of text, unwrapped; brackets in it are plain characters."""
    out().print(escape(text), soft_wrap=True)


def fail(message: str, code: str) -> NoReturn:
    """Ends the command with exit status 1 and one red sentence."""
    error = Console(stderr=True, highlight=False, soft_wrap=True)
    error.print(f"[red]Error: {escape(message)}[/red] [dim]({escape(code)})[/dim]")
    raise typer.Exit(1)


def show(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Sequence[str]], *, as_json: bool, empty: str) -> None:
    """The rows as the server sent them, or `columns` (title → one cell per row) as a table."""
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    if not rows:
        say(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in columns:
        table.add_column(title, overflow="fold")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*(escape(cell) for cell in cells))
    out().print(table)


def facts(pairs: Iterable[tuple[str, object]]) -> None:
    """Names and values, one pair per line; values that are None are left out."""
    table = Table.grid(padding=(0, 2))
    for name, value in pairs:
        if value is not None:
            table.add_row(f"[dim]{name}[/dim]", escape(str(value)))
    out().print(table)


def moment(seconds: int | None) -> str:
    """Unix seconds as local time."""
    if seconds is None:
        return "-"
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def size(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
