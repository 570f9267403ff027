"""`lora-depot download` and `merge`: adapters and merged models as folders on this machine."""

import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from cli.client import Client
from cli.console import out, say
from cli.errors import CommandError
from cli.merge_options import (
    DtypeOption,
    MergeDtype,
    MergeOptions,
    MergeStart,
    ScaleOption,
    ShardSizeOption,
    StartOption,
)
from cli.merging import fold, merge_here
from cli.objects import Merge
from cli.session import connected
from cli.transfer import bars
from cli.transfer import download as fetch_all

POLL_SECONDS = 0.5
WAITING = frozenset({"queued", "running"})


def download(
    ref: Annotated[str, typer.Argument(metavar="NAME[@VERSION|@ALIAS]", help="The latest version if none is named.")],
    *,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="A folder that is not there yet. Default: NAME-vN.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="The whole model with the adapter folded in.")] = False,
    dtype: DtypeOption = MergeDtype.BASE,
    scale: ScaleOption = 1.0,
    shard_size: ShardSizeOption = None,
    start: StartOption = MergeStart.ORIGINAL,
    alias: Annotated[
        str | None, typer.Option(help="With --merged: points at the version once the merge is stored.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="With --merged: a folder of the base model. Only the adapter is fetched and merged here."),
    ] = None,
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="Merge into a base that is not the registered one.")
    ] = False,
) -> None:
    """Download an adapter, or the merged model. Interrupted, it continues where it stopped."""
    options = MergeOptions(dtype.value, scale, shard_size, start.value)
    if (base and not merged) or (allow_other_base and not base):
        raise CommandError("--base goes with --merged, and --allow-other-base with --base.", code="usage")
    if (options != MergeOptions() or alias) and not merged:
        raise CommandError("--dtype, --scale, --shard-size, --start and --alias go with --merged.", code="usage")
    if alias and base:
        raise CommandError("--alias waits for a merge on the server; with --base there is none.", code="usage")
    name, _, wanted = ref.partition("@")
    with connected() as client, bars(out()) as progress:
        version = client.version(name, wanted or "latest")
        number = version["version"]
        target = out_dir or Path(f"{name}-v{number}{'-merged' if merged else ''}")
        if base:
            merging = partial(merge_here, options=options, any_base=allow_other_base, progress=progress)
            say(merging(client, version, base, target))
            return
        if merged:
            merge = wait_for_merge(client, client.request_merge(name, number, options, alias=alias), progress)
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
    *,
    base: Annotated[Path, typer.Option(help="Folder of the base model.")],
    adapter: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    out_dir: Annotated[Path, typer.Option("--out", help="A folder that is not there yet.")],
    dtype: DtypeOption = MergeDtype.BASE,
    scale: ScaleOption = 1.0,
    shard_size: ShardSizeOption = None,
    start: StartOption = MergeStart.ORIGINAL,
) -> None:
    """Merge an adapter into its base model on this machine, without a server."""
    for folder in (base, adapter):
        if not folder.is_dir():
            raise CommandError(f"{folder} is not a folder.", code="not_found")
    if out_dir.exists():
        raise CommandError(f"{out_dir} exists already. Choose another folder with --out.", code="exists")
    with bars(out()) as progress:
        options = MergeOptions(dtype.value, scale, shard_size, start.value)
        report = fold(base, adapter, out_dir, options=options, progress=progress)
    say(f"{len(report.tensors)} tensors were changed, {report.copied_tensors} copied. The model is in {out_dir}.")
