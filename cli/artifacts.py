"""`lora-depot download` and `merge`: adapters and merged models as folders on this machine."""

import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import Progress

from cli.client import Client
from cli.console import out, say
from cli.errors import CommandError
from cli.objects import Merge
from cli.session import connected
from cli.transfer import bars
from cli.transfer import download as fetch_all

POLL_SECONDS = 0.5
WAITING = frozenset({"queued", "running"})


class MergeDtype(StrEnum):
    """Of merged weights; `base` keeps the base model's own."""

    BASE = "base"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


LOCAL_DTYPES: dict[MergeDtype, Literal["float32", "bfloat16", "float16"] | None] = {
    MergeDtype.BASE: None,
    MergeDtype.FLOAT32: "float32",
    MergeDtype.BFLOAT16: "bfloat16",
    MergeDtype.FLOAT16: "float16",
}


def download(
    ref: Annotated[str, typer.Argument(metavar="NAME[@VERSION|@ALIAS]", help="The latest version if none is named.")],
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="A folder that is not there yet. Default: NAME-vN.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="The whole model with the adapter folded in.")] = False,
    dtype: Annotated[MergeDtype, typer.Option(help="Of the merged weights.")] = MergeDtype.BASE,
) -> None:
    """Download an adapter, or the merged model. Interrupted, it continues where it stopped."""
    name, _, wanted = ref.partition("@")
    with connected() as client, bars(out()) as progress:
        version = client.version(name, wanted or "latest")
        number = version["version"]
        target = out_dir or Path(f"{name}-v{number}{'-merged' if merged else ''}")
        if merged:
            merge = wait_for_merge(client, client.request_merge(name, number, dtype=dtype), progress)
            files, digest = merge["files"], merge["digest"]
            fetch_all(files, lambda path: client.merge_link(merge["id"], path), target, progress=progress)
        else:
            files, digest = version["files"], version["digest"]
            fetch_all(files, lambda path: client.version_link(name, number, path), target, progress=progress)
    say(f"{name}@{number}{' merged' if merged else ''} is in {target} ({len(files)} files, {digest}).")


def wait_for_merge(client: Client, merge: Merge, progress: Progress) -> Merge:
    """The merge once it has succeeded; CommandError when it has not."""
    task = progress.add_task(f"merging {merge['adapter']}@{merge['version']}", total=None)
    while merge["status"] in WAITING:
        time.sleep(POLL_SECONDS)
        merge = client.merge(merge["id"])
    progress.remove_task(task)
    if merge["status"] != "succeeded":
        error = merge["error"] or {"message": f"The merge is {merge['status']}.", "code": merge["status"]}
        raise CommandError(error["message"], code=error["code"])
    return merge


def merge(
    base: Annotated[Path, typer.Option(help="Folder of the base model.")],
    adapter: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    out_dir: Annotated[Path, typer.Option("--out", help="A folder that is not there yet.")],
    dtype: Annotated[MergeDtype, typer.Option(help="Of the merged weights.")] = MergeDtype.BASE,
) -> None:
    """Merge an adapter into its base model on this machine, without a server."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the merge has its own threads, which those would hinder
    from lora_core.errors import LoraError
    from lora_core.merge import merge as fold

    for folder in (base, adapter):
        if not folder.is_dir():
            raise CommandError(f"{folder} is not a folder.", code="not_found")
    if out_dir.exists():
        raise CommandError(f"{out_dir} exists already. Choose another folder with --out.", code="exists")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with bars(out()) as progress:
        task = progress.add_task("merging", total=None)
        try:
            report = fold(
                base,
                adapter,
                out_dir,
                dtype=LOCAL_DTYPES[dtype],
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        except LoraError as error:
            raise CommandError(f"{error.message}.", code=error.code) from None
    say(f"{len(report.tensors)} tensors were changed, {report.copied_tensors} copied. The model is in {out_dir}.")
