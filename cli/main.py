"""The `lora-depot` command."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cli import adapters, artifacts, base, files, job_history, webhooks
from cli.console import facts, fail
from cli.errors import CommandError
from cli.session import connected


class Commands(TyperGroup):
    """Every command of every group: what goes wrong in one is a sentence, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CommandError as error:
            fail(error.message, error.code)
        except OSError as error:
            if error.filename is None:
                raise
            fail(f"{error.filename}: {error.strerror}.", "file")


app = typer.Typer(cls=Commands, no_args_is_help=True, help="Train, version and ship LoRA adapters.")
app.add_typer(base.app, name="base")
app.add_typer(files.app, name="files")
app.add_typer(job_history.app, name="jobs")
app.add_typer(adapters.app, name="adapters")
app.add_typer(adapters.alias_app, name="alias")
app.add_typer(webhooks.app, name="webhooks")
app.command()(artifacts.download)
app.command()(artifacts.merge)


@app.callback()
def main() -> None:
    """Train, version and ship LoRA adapters."""


@app.command()
def up(
    home: Annotated[
        Path | None, typer.Option(envvar="DEPOT_HOME", help="Where everything is kept. Default: ~/.lora-depot.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The API's port. Default: 8321 if free, else any.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, max=64, help="Jobs that run at a time.")] = 1,
) -> None:
    """Start the whole depot on this machine; Ctrl-C stops it."""
    from cli.up import up as run

    raise typer.Exit(run(home, port=port, slots=slots))


@app.command()
def verify(
    home: Annotated[Path | None, typer.Option(help="A depot's home. Default: DEPOT_HOME, or ~/.lora-depot.")] = None,
    digests: Annotated[bool, typer.Option("--digests", help="Read and hash every object, too.")] = False,
) -> None:
    """Compare the database with the store; exit status 1 on any difference."""
    from cli.verify import verify as run

    raise typer.Exit(run(home, digests=digests))


@app.command()
def status() -> None:
    """Show which depot this is and whether it can work."""
    with connected() as client:
        checks = client.readiness()
        newest = next(client.jobs(), None)
        facts(
            [
                ("depot", client.url),
                *checks.items(),
                ("base models", sum(1 for _ in client.base_models())),
                ("adapters", sum(1 for _ in client.adapters())),
                ("newest job", f"{newest['id']} {newest['state']}" if newest else "none"),
                ("API docs", f"{client.url}/docs"),
            ]
        )


if __name__ == "__main__":
    app()
