"""`lora-depot adapters` and `alias`: what was trained, and the names that point at it."""

import json
from typing import Annotated

import typer

from cli.console import facts, moment, say, show
from cli.session import AsJson, connected

app = typer.Typer(no_args_is_help=True, help="Adapters and their versions.")
alias_app = typer.Typer(no_args_is_help=True, help="Names that point at versions.")
Name = Annotated[str, typer.Argument(help="Name of an adapter.")]


@app.command("list")
def listing(
    search: Annotated[str | None, typer.Option(help="Part of the name.")] = None, as_json: AsJson = False
) -> None:
    """List your adapters by name."""
    with connected() as client:
        rows = list(client.adapters(search))
    columns = {
        "NAME": [row["name"] for row in rows],
        "LATEST": [str(row["latest_version"] or "-") for row in rows],
        "ALIASES": [" ".join(f"{name}→{number}" for name, number in sorted(row["aliases"].items())) for row in rows],
        "BASE MODEL": [row["base_model"] for row in rows],
        "CREATED": [moment(row["created_at"]) for row in rows],
    }
    show(rows, columns, as_json=as_json, empty="No adapter. Train one: lora-depot jobs submit --help")


@app.command("show")
def one(name: Name, as_json: AsJson = False) -> None:
    """Show one adapter and its versions, newest first."""
    with connected() as client:
        adapter, rows = client.adapter(name), list(client.versions(name))
    if as_json:
        typer.echo(json.dumps({**adapter, "versions": rows}, indent=2, ensure_ascii=False))
        return
    facts([("adapter", adapter["name"]), ("base model", adapter["base_model"])])
    columns = {
        "VERSION": [str(row["version"]) for row in rows],
        "ALIASES": [" ".join(row["aliases"]) for row in rows],
        "R": [str(row["lora"].get("r", "")) for row in rows],
        "TRAIN LOSS": [_number(row["metrics"], "train_loss") for row in rows],
        "VALID LOSS": [_number(row["metrics"], "valid_loss") for row in rows],
        "CREATED": [moment(row["created_at"]) for row in rows],
        "DIGEST": [row["digest"][:19] for row in rows],
    }
    show(rows, columns, as_json=False, empty="No version yet.")


@alias_app.command("set")
def set_alias(
    name: Name,
    alias: Annotated[str, typer.Argument(help="Such as production.")],
    version: Annotated[int, typer.Argument(min=1, help="Number of a version.")],
) -> None:
    """Point an alias at a version, in one step."""
    with connected() as client:
        pointer = client.set_alias(name, alias, version)
    say(f"{pointer['adapter']}@{pointer['alias']} is version {pointer['version']} now.")


def _number(metrics: dict[str, object] | None, name: str) -> str:
    value = (metrics or {}).get(name)
    return f"{value:.4f}" if isinstance(value, int | float) else ""
