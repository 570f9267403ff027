"""What every command starts from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from cli.client import Client
from cli.connection import find_connection

AsJson = Annotated[bool, typer.Option("--json", help="Print the server's JSON.")]


@contextmanager
def connected() -> Iterator[Client]:
    """A client of the depot that the environment or the home names."""
    with Client(find_connection()) as client:
        yield client
