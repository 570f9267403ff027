"""The `lora-depot` command."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Train, version and ship LoRA adapters.")


@app.callback()
def main() -> None:
    """Train, version and ship LoRA adapters."""


@app.command()
def up(
    home: Annotated[
        Path | None, typer.Option(envvar="DEPOT_HOME", help="Where everything is kept. [~/.lora-depot]")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The API's port. [8321 if free, else any]")] = None,
    slots: Annotated[int, typer.Option(min=1, max=64, help="Jobs that run at a time.")] = 1,
) -> None:
    """Start the whole depot on this machine; Ctrl-C stops it."""
    from cli.up import up as run

    raise typer.Exit(run(home, port=port, slots=slots))


if __name__ == "__main__":
    app()
