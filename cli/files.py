"""`lora-depot files`: training data."""

from pathlib import Path
from typing import Annotated

import typer

from cli.console import moment, out, say, show, size
from cli.session import AsJson, connected
from cli.transfer import bars
from cli.transfer import upload as send

app = typer.Typer(no_args_is_help=True, help="Training files.")


@app.command("upload")
def upload(path: Annotated[Path, typer.Argument(help="JSON lines of messages, or of prompt and completion.")]) -> None:
    """Upload a training file; every row is checked."""
    with connected() as client, bars(out()) as progress:
        file = send(client, path, purpose="fine-tune", progress=progress)
    say(f"{file['id']}  {file['filename']}  {(file['report'] or {}).get('rows')} rows")


@app.command("list")
def listing(as_json: AsJson = False) -> None:
    """List your uploads, newest first."""
    with connected() as client:
        rows = list(client.files())
    columns = {
        "ID": [row["id"] for row in rows],
        "NAME": [row["filename"] for row in rows],
        "PURPOSE": [row["purpose"] for row in rows],
        "ROWS": [str((row["report"] or {}).get("rows", "")) for row in rows],
        "SIZE": [size(row["bytes"]) for row in rows],
        "CREATED": [moment(row["created_at"]) for row in rows],
    }
    show(rows, columns, as_json=as_json, empty="No file yet. Upload one: lora-depot files upload PATH")
