"""A small client of the depot's HTTP API. What is safe to repeat is repeated; nothing else is."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast
from urllib.parse import quote

from cli.connection import Connection, uses_proxies
from cli.errors import CommandError, NotConnected, Refused
from cli.merge_options import MergeOptions
from cli.objects import (
    Adapter,
    Alias,
    Attempt,
    BaseModelInfo,
    Checkpoint,
    Event,
    FileInfo,
    Job,
    Merge,
    Merged,
    QueueInfo,
    Version,
    Webhook,
)
from cli.upload import ProgressFile

if TYPE_CHECKING:
    import httpx  # a third of what commands take to start, and `merge` talks to nobody

RETRIED = frozenset({429, 502, 503, 504})
WAITS = (0.2, 0.6, 1.5)
# Seconds to connect, to read, to write, and for a free connection.
TIMEOUT = (5.0, 60.0, 60.0, 60.0)
# The server hashes and stores what it received before it answers: minutes, for a large shard.
UPLOAD_TIMEOUT = (5.0, 600.0, 600.0, 600.0)


@dataclass(frozen=True)
class Link:
    """A short-lived address of one file, and what its bytes must be."""

    url: str
    sha256: str
    size: int


class Client:
    """One method per thing a command does. Errors are CommandErrors: Refused by the server, or NotConnected."""

    def __init__(self, connection: Connection) -> None:
        import httpx

        self.url = connection.url
        self._http = httpx.Client(
            base_url=connection.url,
            headers={"Authorization": f"Bearer {connection.api_key}"},
            timeout=TIMEOUT,
            trust_env=uses_proxies(connection.url),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    # ── files and base models ────────────────────────────────────────────────────────────────────

    def upload(self, file: ProgressFile, *, purpose: str) -> FileInfo:
        """Sends one file, streamed."""
        form = {"data": {"purpose": purpose}, "files": {"file": (file.filename, file)}, "timeout": UPLOAD_TIMEOUT}
        return cast(FileInfo, self._call("POST", "/v1/files", repeat=False, **form))

    def files(self, purpose: str | None = None) -> Iterator[FileInfo]:
        return cast(Iterator[FileInfo], self._pages("/v1/files", {"purpose": purpose, "limit": 1000}))

    def add_base_model(
        self, name: str, files: Mapping[str, str], *, source: str, revision: str | None
    ) -> BaseModelInfo:
        """Registers uploaded files, path → file id, as a base model; the same bytes again change nothing."""
        body = {"name": name, "source": source, "revision": revision, "files": dict(files)}
        return cast(BaseModelInfo, self._call("POST", "/v1/base-models", json=body))

    def base_model(self, name: str) -> BaseModelInfo:
        return cast(BaseModelInfo, self._call("GET", f"/v1/base-models/{quote(name)}"))

    def base_models(self) -> Iterator[BaseModelInfo]:
        return cast(Iterator[BaseModelInfo], self._pages("/v1/base-models", {"limit": 100}))

    # ── jobs ─────────────────────────────────────────────────────────────────────────────────────

    def submit(self, body: Mapping[str, Any], *, idempotency_key: str) -> Job:
        """Queues a job. With the same key and body it is the same job, however often it is sent."""
        headers = {"Idempotency-Key": idempotency_key}
        return cast(Job, self._call("POST", "/v1/fine_tuning/jobs", json=dict(body), headers=headers))

    def jobs(self) -> Iterator[Job]:
        return cast(Iterator[Job], self._pages("/v1/fine_tuning/jobs", {"limit": 100}))

    def job(self, job_id: str) -> Job:
        return cast(Job, self._call("GET", f"/v1/fine_tuning/jobs/{_part(job_id)}"))

    def cancel(self, job_id: str) -> Job:
        return cast(Job, self._call("POST", f"/v1/fine_tuning/jobs/{_part(job_id)}/cancel"))

    def retry(self, job_id: str, *, patch: Any, idempotency_key: str) -> Job:
        """Queues an ended job again; `patch` is "suggested", a JSON Patch, or None."""
        path, headers = f"/v1/fine_tuning/jobs/{_part(job_id)}/retry", {"Idempotency-Key": idempotency_key}
        return cast(Job, self._call("POST", path, json={"patch": patch}, headers=headers))

    def queue(self, job_id: str) -> QueueInfo:
        return cast(QueueInfo, self._call("GET", f"/v1/fine_tuning/jobs/{_part(job_id)}/queue"))

    def pause(self, job_id: str) -> Job:
        return cast(Job, self._call("POST", f"/v1/fine_tuning/jobs/{_part(job_id)}/pause"))

    def resume(self, job_id: str) -> Job:
        return cast(Job, self._call("POST", f"/v1/fine_tuning/jobs/{_part(job_id)}/resume"))

    def events(self, job_id: str) -> Iterator[Event]:
        """Newest first; pages are fetched as they are read."""
        return cast(Iterator[Event], self._pages(f"/v1/fine_tuning/jobs/{_part(job_id)}/events", {"limit": 200}))

    def attempts(self, job_id: str) -> Iterator[Attempt]:
        """Newest first."""
        return cast(Iterator[Attempt], self._pages(f"/v1/fine_tuning/jobs/{_part(job_id)}/attempts", {"limit": 100}))

    def curves(self, job_id: str, *, points: int) -> list[dict[str, Any]]:
        """Losses, learning rate and speed by step, at most so many points."""
        path = f"/v1/fine_tuning/jobs/{_part(job_id)}/metrics"
        return cast(list[dict[str, Any]], self._call("GET", path, params={"points": points})["points"])

    def checkpoints(self, job_id: str) -> Iterator[Checkpoint]:
        """Newest first."""
        path = f"/v1/fine_tuning/jobs/{_part(job_id)}/checkpoints"
        return cast(Iterator[Checkpoint], self._pages(path, {"limit": 100}))

    def publish_checkpoint(self, job_id: str, checkpoint_id: str) -> Version:
        """The version of this checkpoint, made now or before."""
        path = f"/v1/fine_tuning/jobs/{_part(job_id)}/checkpoints/{_part(checkpoint_id)}/publish"
        return cast(Version, self._call("POST", path))

    # ── webhooks ─────────────────────────────────────────────────────────────────────────────────

    def webhooks(self) -> Iterator[Webhook]:
        return cast(Iterator[Webhook], self._pages("/v1/webhook_endpoints", {"limit": 100}))

    def webhook_event_types(self) -> list[dict[str, str]]:
        return cast(list[dict[str, str]], self._call("GET", "/v1/webhook_endpoints/event_types")["data"])

    def add_webhook(self, *, name: str, url: str, event_types: Sequence[str]) -> dict[str, Any]:
        """The endpoint, with the secret that signs what is sent to it."""
        body = {"name": name, "url": url, "event_types": list(event_types)}
        return self._call("POST", "/v1/webhook_endpoints", repeat=False, json=body)

    def delete_webhook(self, webhook_id: str) -> None:
        self._call("DELETE", f"/v1/webhook_endpoints/{_part(webhook_id)}")

    def test_webhook(self, webhook_id: str, event_type: str) -> dict[str, Any]:
        path = f"/v1/webhook_endpoints/{_part(webhook_id)}/test"
        return self._call("POST", path, repeat=False, json={"event_type": event_type})

    # ── adapters and merges ──────────────────────────────────────────────────────────────────────

    def adapters(self, search: str | None = None) -> Iterator[Adapter]:
        return cast(Iterator[Adapter], self._pages("/v1/adapters", {"search": search, "limit": 200}))

    def adapter(self, name: str) -> Adapter:
        return cast(Adapter, self._call("GET", f"/v1/adapters/{_part(name)}"))

    def versions(self, name: str) -> Iterator[Version]:
        return cast(Iterator[Version], self._pages(f"/v1/adapters/{_part(name)}/versions", {"limit": 100}))

    def version(self, name: str, ref: str) -> Version:
        """By number, alias or `latest`."""
        return cast(Version, self._call("GET", _version(name, ref)))

    def set_alias(self, name: str, alias: str, version: int) -> Alias:
        path = f"/v1/adapters/{_part(name)}/aliases/{_part(alias)}"
        return cast(Alias, self._call("PUT", path, json={"version": version}))

    def request_merge(self, name: str, version: int, options: MergeOptions, *, alias: str | None = None) -> Merge:
        """The merge of this version with these options, new or known; once stored, `alias` points at the version."""
        body = options.as_json() | ({"alias": alias} if alias else {})
        return cast(Merge, self._call("POST", f"{_version(name, str(version))}/merges", json=body))

    def merge(self, merge_id: str) -> Merge:
        return cast(Merge, self._call("GET", f"/v1/merges/{_part(merge_id)}"))

    def merged(self, name: str, version: int, options: MergeOptions) -> Merged:
        """The files of the merged checkpoint of a version."""
        return cast(Merged, self._call("GET", f"{_version(name, str(version))}/merged", params=options.as_json()))

    def merge_recipe(self, name: str, version: int) -> bytes | None:
        """How a version is merged, as JSON; None if it was published without that."""
        try:
            return self._send("GET", f"{_version(name, str(version))}/merge-recipe").content
        except Refused as refusal:
            if refusal.code == "artifact_not_found":
                return None
            raise

    def version_link(self, name: str, version: int, path: str) -> Link:
        return self._link(f"{_version(name, str(version))}/files/{quote(path)}")

    def merge_link(self, merge_id: str, path: str) -> Link:
        return self._link(f"/v1/merges/{_part(merge_id)}/files/{quote(path)}")

    def readiness(self) -> dict[str, str]:
        """Each part of the service and its state; Refused when one of them fails."""
        return cast(dict[str, str], self._call("GET", "/readyz")["checks"])

    # ── the wire ─────────────────────────────────────────────────────────────────────────────────

    def _link(self, path: str) -> Link:
        import httpx

        response = self._send("GET", path)
        try:
            url, sha256 = response.headers["location"], response.headers["x-depot-sha256"]
            size = int(response.headers["x-depot-size"])
        except (KeyError, ValueError):
            raise CommandError(f"{self.url} sent no download link; is it a LoRA Depot of this version?") from None
        return Link(str(httpx.URL(self.url).join(url)), sha256, size)

    def _pages(self, path: str, params: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        wanted = {name: value for name, value in params.items() if value is not None}
        while True:
            page = self._call("GET", path, params=wanted)
            yield from page["data"]
            if not page["has_more"] or not page["data"]:
                return
            wanted["after"] = page["last_id"]

    def _call(self, method: str, path: str, *, repeat: bool = True, **kwargs: Any) -> dict[str, Any]:
        response = self._send(method, path, repeat=repeat, **kwargs)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise CommandError(f"{self.url} does not answer like a LoRA Depot. Check DEPOT_URL.")
        return answer

    def _send(self, method: str, path: str, *, repeat: bool = True, **kwargs: Any) -> "httpx.Response":
        """The response, below 400. Failures that a repetition may mend are repeated a few times if `repeat`."""
        import httpx

        for wait in (*WAITS, None):
            try:
                response = self._http.request(method, path, **kwargs)
            except httpx.TransportError as error:
                if wait is None or not repeat:
                    raise self._silent(error) from None
            else:
                if response.status_code < 400:
                    return response
                if wait is None or not repeat or response.status_code not in RETRIED:
                    raise _refusal(response)
            time.sleep(wait)
        raise AssertionError("the last round returns or raises")

    def _silent(self, error: "httpx.TransportError") -> CommandError:
        import httpx

        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return NotConnected(f"No depot answers at {self.url}. Start it with `lora-depot up`, or set DEPOT_URL.")
        return NotConnected(f"The depot at {self.url} broke off the connection ({type(error).__name__}). Try again.")


def _version(name: str, ref: str) -> str:
    return f"/v1/adapters/{_part(name)}/versions/{_part(ref)}"


def _part(text: str) -> str:
    """One segment of a path: nothing a person types can reach another address."""
    if text in {"", ".", ".."}:
        raise CommandError(f"{text!r} is not a name.")
    return quote(text, safe="")


def _refusal(response: "httpx.Response") -> Refused:
    status = response.status_code
    try:
        error = response.json()["error"]
        message, code = str(error["message"]), str(error["code"])
        details = error.get("details") or {}
    except (ValueError, KeyError, TypeError, AttributeError):
        return Refused(f"The server answered with status {status}.", code="http", status=status)
    if isinstance(failed := details.get("failed"), dict):
        message += " " + "; ".join(f"{part}: {word}" for part, word in failed.items())
    return Refused(message, code=code, status=status)
