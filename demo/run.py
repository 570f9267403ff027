"""The main job of LoRA Depot on one machine, from a base model to a proof: submit, train, browse, download, merge."""

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import time
import uuid
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table

from cli.artifacts import wait_for_merge
from cli.base_source import find_base
from cli.client import Client
from cli.errors import CommandError
from cli.home import Home
from cli.merge_options import MergeOptions
from cli.objects import Job, Version
from cli.transfer import bars, download, upload, upload_base
from cli.watch import watch
from demo import corpus
from demo.base import Recipe, make_base
from demo.depot import DepotFailed, demo_home, running_depot
from demo.proof import Proof, ProofFailed, prove

BASE_MODEL = "demo/stdlib-llama"
ADAPTER = "stdlib-qa"
HELDOUT_ROWS = 200  # at least
QUESTIONS = 2
SETTINGS: dict[str, Any] = {
    "seed": 0,
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 16}}},
    "lora": {"adapter": ADAPTER, "r": 16, "lora_alpha": 32, "learning_rate": 3e-3, "warmup_ratio": 0.05},
    "metadata": {"from": "make demo"},
}

console = Console(highlight=False)


def main() -> int:
    """Runs the demo; 1 when a part fails or a claim does not hold."""
    arguments = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    arguments.add_argument("--keep", action="store_true", help="leave the depot running until Ctrl-C")
    keep = arguments.parse_args().keep
    quieten()
    for ending in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: the depot that the demo started ends with it
        signal.signal(ending, signal.default_int_handler)
    home = demo_home()
    started = time.monotonic()
    try:
        with running_depot(home) as (client, ours):
            console.print(f"[bold]LoRA Depot[/bold] at {client.url}, everything in {escape(str(home.root))}")
            run(client, home.root / "demo")
            console.print(f"\n[green]All of it holds.[/green] {time.monotonic() - started:.0f} seconds.\n")
            waits = ours and (keep or sys.stdin.isatty())
            farewell(client.url, home, stays=waits or not ours)
            if waits:
                wait(keep=keep)
    except KeyboardInterrupt:
        say("\nStopped.")
        return 130
    except (CommandError, DepotFailed, ProofFailed) as error:
        Console(stderr=True).print(f"[red]The demo failed: {escape(str(error))}[/red]", soft_wrap=True)
        return 1
    return 0


def quieten() -> None:
    """Nothing but the story on the terminal, and no core kept busy with waiting. Must come before torch is loaded."""
    # Threads that wait for each other asleep: spinning, they take the cores from the worker, the API and Postgres.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def run(client: Client, folder: Path, recipe: Recipe | None = None) -> Proof:
    """The whole story; what it makes lies below `folder`."""
    title("1  A base model, trained here on Python's own documentation")
    base = make_base(folder / "base", say, recipe)
    register(client, base)
    title("2  Questions and answers from the docstrings of the standard library")
    data = write_data(folder / "data")
    title("3  Fine-tuning")
    job = fine_tune(client, data)
    title("4  What the depot has now")
    version = browse(client, job)
    title("5  The adapter and the merged model, as files")
    adapter, merged = fetch(client, version, folder)
    title("6  Proof, on questions about modules that no training saw")
    rows = corpus.pairs("heldout")
    functions = [row for row in rows if row["prompt"].startswith("What does")]
    asked = functions[:: len(functions) // QUESTIONS][:QUESTIONS]
    # Evenly over all modules, which come in the order of their names.
    proof = prove(base, adapter, merged, rows[:: len(rows) // HELDOUT_ROWS], asked)
    show_proof(proof)
    return proof


def register(client: Client, base: Path) -> None:
    """`lora-depot base add`, as a function."""
    found = find_base(str(base), say)
    with bars(console) as progress:
        files = upload_base(client, found.files, progress=progress)
    model = client.add_base_model(BASE_MODEL, files, source=found.source, revision=found.revision)
    say(f"Registered as {model['name']}: {model['parameters']:,} parameters, {model['digest']}")


def write_data(folder: Path) -> dict[corpus.Split, Path]:
    """One JSONL file for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[corpus.Split, Path] = {}
    for split in corpus.SPLITS:
        rows = corpus.pairs(split)
        files[split] = folder / f"{split}.jsonl"
        files[split].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        say(f"{split:>10}: {len(rows):5,} rows   {json.dumps(rows[0])[:90]}")
    return files


def fine_tune(client: Client, data: dict[corpus.Split, Path]) -> Job:
    """Upload, submit, watch; CommandError unless the job succeeds."""
    with bars(console) as progress:
        training = upload(client, data["train"], purpose="fine-tune", progress=progress)
        validation = upload(client, data["validation"], purpose="fine-tune", progress=progress)
    body = {**SETTINGS, "model": BASE_MODEL, "training_file": training["id"], "validation_file": validation["id"]}
    say(f"POST /v1/fine_tuning/jobs {json.dumps(body)}")
    job = client.submit(body, idempotency_key=str(uuid.uuid4()))
    job = watch(client, job["id"], console)
    if job["state"] != "succeeded":
        error = job["error"] or {"message": f"the job is {job['state']}", "code": job["state"]}
        raise CommandError(error["message"], code=error["code"])
    return job


def browse(client: Client, job: Job) -> Version:
    """The adapters and the version that the job published."""
    for adapter in client.adapters():
        say(f"{adapter['name']}: latest version {adapter['latest_version']}, trained on {adapter['base_model']}")
    version = client.version(job["adapter"], str(job["version"]))
    for file in version["files"]:
        say(f"  {version['ref']}  {file['path']}  {file['bytes']:,} bytes  sha256:{file['sha256'][:16]}…")
    return version


def fetch(client: Client, version: Version, folder: Path) -> tuple[Path, Path]:
    """Downloads the adapter, asks for its merge, downloads that."""
    name, number = version["adapter"], version["version"]
    adapter, merged = folder / f"{name}-v{number}", folder / f"{name}-v{number}-merged"
    for old in (adapter, merged):  # of a depot that was emptied since
        shutil.rmtree(old, ignore_errors=True)
    with bars(console) as progress:
        download(version["files"], lambda path: client.version_link(name, number, path), adapter, progress=progress)
        merge = wait_for_merge(client, client.request_merge(name, number, MergeOptions()), progress)
        download(merge["files"], lambda path: client.merge_link(merge["id"], path), merged, progress=progress)
    say(f"The adapter: {adapter}")
    say(f"The merged model: {merged}")
    return adapter, merged


def show_proof(proof: Proof) -> None:
    """The losses as a table, and one question answered twice."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("model", "evaluation loss", "largest |Δ logit|"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for candidate in proof.candidates:
        distance = proof.difference.get(candidate.name)
        table.add_row(candidate.name, f"{candidate.loss:.4f}", "-" if distance is None else f"{distance:.1e}")
    console.print(table)
    nothing = "(nothing)"
    for question, real, base, adapted in proof.samples:
        say(f"\n{question}\n   docstring: {real}\n        base: {base or nothing}\n     adapter: {adapted or nothing}")


def farewell(url: str, home: Home, *, stays: bool) -> None:
    """Where to look and what to type next."""
    prefix = f"DEPOT_HOME={shlex.quote(str(home.root))} {Path(sys.executable).parent / 'lora-depot'}"
    prefix = prefix.replace(str(Path.cwd()) + os.sep, "") if "DEPOT_HOME" not in os.environ else prefix
    console.print(f"[bold]API docs[/bold]  {url}/docs" + ("" if stays else "  (while the depot runs)"))
    console.print("[bold]Next[/bold]")
    commands = ["adapters list", f"adapters show {ADAPTER}", f"alias set {ADAPTER} production 1"]
    commands += [f"download {ADAPTER}@production --merged --out my-model", "jobs submit --help"]
    for command in commands if stays else ["up", *commands]:
        say(f"  {prefix} {command}")


def wait(*, keep: bool) -> None:
    """Keeps the stack that was started here, until Enter or Ctrl-C."""
    say("\nThe depot keeps running. " + ("Ctrl-C stops it." if keep else "Enter or Ctrl-C stops it."))
    try:
        if keep:
            while True:
                time.sleep(3600)
        input()
    except (KeyboardInterrupt, EOFError):
        pass


def title(text: str) -> None:
    console.print()
    console.print(Rule(f"[bold]{escape(text)}[/bold]", align="left"))


def say(text: str) -> None:
    console.print(escape(text), soft_wrap=True)
