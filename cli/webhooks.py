"""`lora-depot webhooks`: whom to tell when jobs end."""

from typing import Annotated

import typer

from cli.console import facts, moment, say, show
from cli.session import AsJson, connected

app = typer.Typer(no_args_is_help=True, help="Webhooks.")
WebhookId = Annotated[str, typer.Argument(help="webhook-…", metavar="ID")]


@app.command("add")
def add(
    url: Annotated[str, typer.Argument(help="Where events are sent, signed.")],
    name: Annotated[str, typer.Option(help="For you.")] = "webhook",
    event: Annotated[
        list[str] | None, typer.Option(help="What to be told; may be given again. Default: every event.")
    ] = None,
) -> None:
    """Have events sent to an address. The signing secret is shown once."""
    with connected() as client:
        types = event or [row["event_type"] for row in client.webhook_event_types()]
        made = client.add_webhook(name=name, url=url, event_types=types)
    facts([(field, made[field]) for field in ("id", "url", "signing_secret")])
    say("Keep the secret: it is not shown again.")


@app.command("list")
def listing(as_json: AsJson = False) -> None:
    """List your webhooks, newest first."""
    with connected() as client:
        rows = list(client.webhooks())
    columns = {
        "ID": [row["id"] for row in rows],
        "NAME": [row["name"] for row in rows],
        "URL": [row["url"] for row in rows],
        "EVENTS": [", ".join(row["event_types"]) for row in rows],
        "CREATED": [moment(row["created_at"]) for row in rows],
    }
    show(rows, columns, as_json=as_json, empty="No webhook yet. Add one: lora-depot webhooks add URL")


@app.command("types")
def types(as_json: AsJson = False) -> None:
    """List what a webhook can be told."""
    with connected() as client:
        rows = client.webhook_event_types()
    columns = {"EVENT": [row["event_type"] for row in rows], "WHEN": [row["description"] for row in rows]}
    show(rows, columns, as_json=as_json, empty="")


@app.command("delete")
def delete(webhook_id: WebhookId) -> None:
    """Send no more events to an address; those that wait are dropped."""
    with connected() as client:
        client.delete_webhook(webhook_id)
    say(f"{webhook_id} is deleted.")


@app.command("test")
def test(
    webhook_id: WebhookId,
    event: Annotated[str, typer.Option(help="What to tell.")] = "fine_tuning.job.succeeded",
) -> None:
    """Send an event about a job that does not exist, once, and tell the answer."""
    with connected() as client:
        answer = client.test_webhook(webhook_id, event)
    say(f"It answered {answer['status_code']}.")
