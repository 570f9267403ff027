"""`lora-depot base`: the models that adapters are trained on."""

from typing import Annotated

import typer

from cli.console import facts, out, say, show, size
from cli.session import AsJson, connected
from cli.transfer import bars, upload_base

app = typer.Typer(no_args_is_help=True, help="Base models.")


@app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="Its name in the catalogue, such as Qwen/Qwen3-0.6B.")],
    origin: Annotated[str, typer.Option("--from", help=r"A folder, or hub:org/name\[@revision].")],
) -> None:
    """Upload a base model and register it."""
    from cli.base_source import find_base  # numpy, which no other command waits for

    with connected() as client:
        found = find_base(origin, say)
        if found.skipped:
            say(f"Not part of a base model, so not uploaded: {', '.join(found.skipped)}")
        with bars(out()) as progress:
            ids = upload_base(client, found.files, progress=progress)
        base = client.add_base_model(name, ids, source=found.source, revision=found.revision)
    say(f"{base['name']} is registered.")
    facts([(field, base.get(field)) for field in ("architecture", "dtype", "parameters", "revision", "digest")])


@app.command("list")
def listing(as_json: AsJson = False) -> None:
    """List the catalogue."""
    with connected() as client:
        rows = list(client.base_models())
    columns = {
        "NAME": [row["name"] for row in rows],
        "ARCHITECTURE": [row["architecture"] for row in rows],
        "DTYPE": [row["dtype"] for row in rows],
        "PARAMETERS": [f"{row['parameters']:,}" for row in rows],
        "SIZE": [size(sum(file["bytes"] for file in row["files"])) for row in rows],
        "SOURCE": [row["source"] + (f"@{row['revision'][:12]}" if row["revision"] else "") for row in rows],
    }
    show(rows, columns, as_json=as_json, empty="No base model yet. Add one: lora-depot base add NAME --from PATH")
