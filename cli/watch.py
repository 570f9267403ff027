"""Following a job: its events as they come, its loss as a curve that grows."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from cli.client import Client
from cli.curve import Point, curve, smooth
from cli.objects import ENDED, Event, Job

POLL_SECONDS = 1.0
PARTS = 10  # lines about the loss where no curve can be redrawn
STYLES = {"warn": "yellow", "error": "red"}


def follow(client: Client, job_id: str, *, poll_seconds: float = POLL_SECONDS) -> Iterator[tuple[Job, list[Event]]]:
    """The job and its events since the last time, oldest first, until the job has ended."""
    newest: str | None = None
    while True:
        # The job before its events: when it has ended, all its events are there to read.
        job = client.job(job_id)
        fresh: list[Event] = []
        for event in client.events(job_id):
            if event["id"] == newest:
                break
            fresh.append(event)
        newest = fresh[0]["id"] if fresh else newest
        yield job, fresh[::-1]
        if job["state"] in ENDED:
            return
        time.sleep(poll_seconds)


@dataclass
class Board:
    """What is drawn: the curves so far and where the job stands."""

    train: list[Point] = field(default_factory=list)
    valid: list[Point] = field(default_factory=list)
    steps: int = 0

    def add(self, event: Event) -> bool:
        """Takes the point of a metrics event; says whether it was one."""
        data = event["data"] or {}
        if event["type"] != "metrics" or not isinstance(data.get("train_loss"), int | float):
            return False
        step = float(data.get("step", len(self.train)))
        # A retried job starts again: what the lost attempt had reached is no part of this curve.
        self.train = [point for point in self.train if point[0] < step] + [(step, float(data["train_loss"]))]
        self.steps = int(data.get("total_steps") or 0)
        if isinstance(data.get("valid_loss"), int | float):
            self.valid = [point for point in self.valid if point[0] < step] + [(step, float(data["valid_loss"]))]
        return True

    def lines(self, *, width: int = 60, height: int = 8) -> list[str]:
        """The training loss as a smooth curve (single batches jump up and down), and the numbers below it."""
        if not self.train:
            return []
        step, loss = self.train[-1][0], smooth(self.train)[-1][1]
        told = f"step {step:.0f}" + (f" of {self.steps}" if self.steps else "") + f" · smoothed loss {loss:.3f}"
        if self.valid:
            told += f" · validation loss {self.valid[-1][1]:.3f}"
        return [*curve(smooth(self.train), width=width, height=height), told]


def watch(client: Client, job_id: str, console: Console, *, poll_seconds: float = POLL_SECONDS) -> Job:
    """Shows the job until it has ended, and returns it as it then is."""
    board = Board()
    live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
    told = 0  # tenths of the run
    with live or nullcontext():
        for job, events in follow(client, job_id, poll_seconds=poll_seconds):
            for event in events:
                if not board.add(event):
                    console.print(_line(event), soft_wrap=True)
                elif live is None and (part := int(PARTS * board.train[-1][0] / max(board.steps, 1))) > told:
                    told = part
                    console.print(f"  {escape(event['message'])}", soft_wrap=True)
            if live is not None:
                live.update(_picture(board, job, console.width))
    if live is None:
        for line in board.lines():
            console.print(escape(line), soft_wrap=True)
    return job


def _picture(board: Board, job: Job, width: int) -> Group:
    lines = board.lines(width=max(20, min(80, width - 12)))
    return Group(*(Text(line, style="cyan", no_wrap=True) for line in lines), Text(_stand(job), style="dim"))


def _stand(job: Job) -> str:
    progress = job["progress"] or {}
    told = f"{job['id']}  {job['state']}"
    if job["state"] not in ENDED:
        told += f"  {progress['phase']}" if progress.get("phase") else ""
        eta = progress.get("eta_seconds")
        told += f"  about {eta:.0f} s left" if isinstance(eta, int | float) else ""
    return told


def _line(event: Event) -> Text:
    clock = time.strftime("%H:%M:%S", time.localtime(event["created_at"]))
    return Text.assemble((clock, "dim"), "  ", (event["message"], STYLES.get(event["level"], "")))
