"""`lora-depot jobs`: fine-tuning runs."""

import json
import uuid
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import Progress

from cli.client import Client
from cli.console import facts, moment, out, say, show
from cli.errors import CommandError
from cli.objects import Job
from cli.session import AsJson, connected
from cli.transfer import bars, upload
from cli.watch import watch as watch_job

app = typer.Typer(no_args_is_help=True, help="Fine-tuning jobs.")
Method = Literal["supervised", "dpo"]
JobId = Annotated[str, typer.Argument(help="ftjob-…", metavar="ID")]


@app.command("submit")
def submit(
    *,
    model: Annotated[str, typer.Option(help="Name of a base model.")],
    data: Annotated[str, typer.Option(help="A JSONL file, or the id of one that is uploaded.")],
    validation: Annotated[str | None, typer.Option(help="The same, for the validation loss.")] = None,
    adapter: Annotated[str | None, typer.Option(help="What to publish to. Default: the data file's name.")] = None,
    r: Annotated[int | None, typer.Option("--r", help="Rank. Default: 16.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Scaling is lora_alpha / r. Default: 2 r.")] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="Default: 0.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Such as q_proj,v_proj, or paper: query and value. Default: all-linear.")
    ] = None,
    use_rslora: Annotated[bool, typer.Option("--use-rslora", help="Scale by lora_alpha / √r.")] = False,
    lora_setting: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="NAME=VALUE", help="Any other field of `lora`: --lora bias=all; repeatable."),
    ] = None,
    method: Annotated[
        Method, typer.Option(help="dpo learns from rows that prefer one answer to another.")
    ] = "supervised",
    beta: Annotated[float | None, typer.Option(help="Of dpo: holds the model to its base. Default: 0.1.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Default: 3.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step. Default: 8.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 2e-4.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="linear, cosine or constant. Default: linear.")] = None,
    warmup_ratio: Annotated[float | None, typer.Option(help="Default: 0.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default: 0.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per row. Default: 2048.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default: random.")] = None,
    priority: Annotated[int | None, typer.Option(min=0, max=200, help="The lower, the earlier. Default: 100.")] = None,
    queue: Annotated[str | None, typer.Option(help="Which workers may take it. Default: default.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job until it ends.")] = False,
) -> None:
    """Train an adapter: upload the data, queue the job."""
    lora = {
        "adapter": adapter,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "target_modules": _modules(target_modules),
        "use_rslora": use_rslora or None,
        "learning_rate": learning_rate,
        "lr_scheduler_type": scheduler,
        "warmup_ratio": warmup_ratio,
        "weight_decay": weight_decay,
        "max_length": max_length,
        "max_steps": max_steps,
    }
    numbers = _given({"n_epochs": epochs, "batch_size": batch_size, "beta": beta})
    body: dict[str, Any] = {"model": model, "seed": seed, "lora": _settings(lora_setting or []) | _given(lora)}
    body |= {
        "depot": _given({"priority": priority, "queue": queue}),
        "method": {"type": method, method: {"hyperparameters": numbers}},
        "suffix": None if adapter else Path(data).stem[:64],
    }
    _send(_given(body), data, validation, watch=watch)


def _send(body: dict[str, Any], data: str, validation: str | None, *, watch: bool) -> None:
    with connected() as client:
        with bars(out()) as progress:
            body["training_file"] = _file_id(client, data, progress)
            if validation:
                body["validation_file"] = _file_id(client, validation, progress)
        job = client.submit(body, idempotency_key=str(uuid.uuid4()))
        say(f"{job['id']} is queued; it will publish to {job['adapter']}.")
        if watch:
            _watch(client, job["id"])
        else:
            say(f"Follow it: lora-depot jobs watch {job['id']}")


@app.command("list")
def listing(
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 20, as_json: AsJson = False
) -> None:
    """List your jobs, newest first."""
    with connected() as client:
        rows = [job for job, _ in zip(client.jobs(), range(limit), strict=False)]
    columns = {
        "ID": [row["id"] for row in rows],
        "STATE": [row["state"] for row in rows],
        "MODEL": [row["model"] for row in rows],
        "RESULT": [row["fine_tuned_model"] or row["adapter"] for row in rows],
        "CREATED": [moment(row["created_at"]) for row in rows],
    }
    show(rows, columns, as_json=as_json, empty="No job yet. Submit one: lora-depot jobs submit --help")


@app.command("show")
def one(job_id: JobId, as_json: AsJson = False) -> None:
    """Show one job."""
    with connected() as client:
        job = client.job(job_id)
    if as_json:
        typer.echo(json.dumps(job, indent=2, ensure_ascii=False))
        return
    told: list[tuple[str, object]] = [(name, job.get(name)) for name in ("id", "state", "model", "adapter", "version")]
    told += [(name, job.get(name)) for name in ("lora", "hyperparameters", "seed", "progress", "trained_tokens")]
    told += [("created", moment(job["created_at"])), ("finished", moment(job["finished_at"]))]
    if job["error"]:
        told.append(("error", f"{job['error']['message']} ({job['error']['code']})"))
        if patch := job["error"].get("suggested_patch"):
            told.append(("suggested", f"{json.dumps(patch)}; use it: lora-depot jobs retry {job['id']} --suggested"))
    facts(told)


@app.command("watch")
def watch_command(job_id: JobId) -> None:
    """Follow a job with its loss curve. Ctrl-C stops watching, not the job."""
    with connected() as client:
        _watch(client, job_id)


@app.command("cancel")
def cancel(job_id: JobId) -> None:
    """Cancel a job; a running one ends at its next heartbeat."""
    with connected() as client:
        job = client.cancel(job_id)
    say(f"{job['id']} is {job['state']}.")


@app.command("queue")
def queue_command(job_id: JobId) -> None:
    """Tell why a job waits and when it may start."""
    with connected() as client:
        found = client.queue(job_id)
    estimate = found["estimate_seconds"]
    facts(
        [
            *((name, found.get(name)) for name in ("state", "queue", "priority", "position", "message")),
            ("starts in", f"about {estimate} s" if estimate is not None else None),
        ]
    )


@app.command("retry")
def retry(
    job_id: JobId,
    suggested: Annotated[bool, typer.Option("--suggested", help="Apply the patch that the failure suggests.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job until it ends.")] = False,
) -> None:
    """Queue an ended job again, as it was or with the patch that its failure suggests."""
    with connected() as client:
        job = client.retry(job_id, patch="suggested" if suggested else None, idempotency_key=str(uuid.uuid4()))
        say(f"{job['id']} is queued; it repeats {job_id}.")
        if watch:
            _watch(client, job["id"])


@app.command("pause")
def pause(job_id: JobId) -> None:
    """Pause a job; a running one saves its work first."""
    with connected() as client:
        job = client.pause(job_id)
    say(f"{job['id']} is {job['state']}. Go on: lora-depot jobs resume {job['id']}")


@app.command("resume")
def resume(job_id: JobId) -> None:
    """Let a paused job go on."""
    with connected() as client:
        job = client.resume(job_id)
    say(f"{job['id']} is {job['state']}.")


def _watch(client: Client, job_id: str) -> None:
    try:
        job = watch_job(client, job_id, out())
    except KeyboardInterrupt:
        say(f"\nStopped watching; the job goes on. Watch again: lora-depot jobs watch {job_id}")
        raise typer.Exit(130) from None
    _conclude(job)


def _conclude(job: Job) -> None:
    if job["state"] != "succeeded":
        error = job["error"] or {"message": f"The job is {job['state']}.", "code": job["state"]}
        raise CommandError(error["message"], code=error["code"])
    say(f"Published {job['fine_tuned_model']}. Download it: lora-depot download {job['fine_tuned_model']}")


def _file_id(client: Client, text: str, progress: Progress) -> str:
    """`text` itself if it is the id of an upload, else that of the file it names, uploaded now."""
    if text.startswith("file-") and not Path(text).exists():
        return text
    return upload(client, Path(text), purpose="fine-tune", progress=progress)["id"]


def _settings(given: list[str]) -> dict[str, Any]:
    """NAME=VALUE as fields: the value is JSON where it reads as such, else text."""
    found = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise CommandError(f"--lora takes NAME=VALUE, such as bias=all, not {item!r}.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _modules(text: str | None) -> str | list[str] | None:
    if text is None or text in {"all-linear", "paper"}:
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
