"""`lora-depot jobs …`: what became of a job, and what can be had of it on the way."""

import json
import re
from typing import Annotated, Any

import typer

from cli.console import moment, out, say, show, size
from cli.curve import Point, curve
from cli.jobs import JobId, app
from cli.session import AsJson, connected

__all__ = ["app"]
WIDTH = 60


@app.command("logs")
def logs(
    job_id: JobId,
    as_json: AsJson = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="Lines about single steps, too.")] = False,
) -> None:
    """Print what a job told, oldest first."""
    with connected() as client:
        rows = [event for event in client.events(job_id) if metrics or event["type"] != "metrics"][::-1]
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for event in rows:
        mark = "" if event["level"] == "info" else f"{event['level']}: "
        say(f"{moment(event['created_at'])}  {mark}{event['message']}")


@app.command("attempts")
def attempts(job_id: JobId, as_json: AsJson = False) -> None:
    """List every time a worker took a job, newest first."""
    with connected() as client:
        rows = list(client.attempts(job_id))
    columns = {
        "ATTEMPT": [str(row["attempt"]) for row in rows],
        "WORKER": [row["worker"] for row in rows],
        "STARTED": [moment(row["started_at"]) for row in rows],
        "ENDING": [row["ending"] or "runs" for row in rows],
        "STEP": [_text(row["last_step"]) for row in rows],
        "RESUME": [_text(row["resume"]) for row in rows],
        "ERROR": [_text(row["error"] and f"{row['error']['message']} ({row['error']['code']})") for row in rows],
    }
    show(rows, columns, as_json=as_json, empty="No worker has taken it yet.")


@app.command("curve")
def curve_command(job_id: JobId, as_json: AsJson = False) -> None:
    """Draw a job's losses by step."""
    with connected() as client:
        points = client.curves(job_id, points=2 * WIDTH)
    if as_json:
        typer.echo(json.dumps(points, indent=2))
        return
    drawn = False
    for name, title in (("train_loss", "training loss"), ("valid_loss", "validation loss")):
        lines = curve(_lasts(points, name), width=WIDTH)
        for line in [f"[bold]{title}[/bold]", *lines] if lines else []:
            out().print(line, soft_wrap=True)
        drawn = drawn or bool(lines)
    if not drawn:
        say("No step has been told yet.")


@app.command("checkpoints")
def checkpoints(job_id: JobId, as_json: AsJson = False) -> None:
    """List where a job would go on from, newest first."""
    with connected() as client:
        rows = list(client.checkpoints(job_id))
    columns = {
        "ID": [row["id"] for row in rows],
        "STEP": [str(row["step_number"]) for row in rows],
        "LOSS": [_text(row["metrics"]["train_loss"]) for row in rows],
        "NAME": [row["fine_tuned_model_checkpoint"] for row in rows],
        "SIZE": [size(row["bytes"]) for row in rows],
        "CREATED": [moment(row["created_at"]) for row in rows],
    }
    show(rows, columns, as_json=as_json, empty="No checkpoint is kept of this job.")


@app.command("publish")
def publish(
    job_id: JobId,
    checkpoint: Annotated[str, typer.Argument(help="ftckpt-…, a step, or latest.")] = "latest",
) -> None:
    """Make a version of a job's checkpoint, whatever became of the job."""
    with connected() as client:
        if re.fullmatch(r"latest|[0-9]+", checkpoint):
            kept = {str(row["step_number"]): row["id"] for row in reversed(list(client.checkpoints(job_id)))}
            newest = list(kept.values())[-1] if kept else checkpoint
            checkpoint = newest if checkpoint == "latest" else kept.get(checkpoint, checkpoint)
        version = client.publish_checkpoint(job_id, checkpoint)
    say(f"Published {version['ref']}. Download it: lora-depot download {version['ref']}")


def _lasts(points: list[dict[str, Any]], name: str) -> list[Point]:
    return [(float(point["step"]), float(point[name]["last"])) for point in points if point[name]]


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
