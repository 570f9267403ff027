"""Merging on this machine: any two folders, or an adapter from the depot into a base that is already here."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress

from cli.client import Client
from cli.errors import BadDownload, CommandError, Refused
from cli.merge_options import MergeOptions
from cli.objects import BaseModelInfo, Version
from cli.transfer import download, sha256_of
from lora_core.digest import folder_digest
from lora_core.merge_options import Start

if TYPE_CHECKING:
    from lora_core.merge_report import MergeReport
    from lora_core.recipe import Recipe

REPORT_FILE = "merge_report.json"


def fold(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    options: MergeOptions,
    progress: Progress,
    recipe: bytes | None = None,
    digests: bool = False,
    expected: Mapping[str, str] | None = None,
) -> "MergeReport":
    """Merge two folders into the new folder `out`; CommandError when that cannot be done."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the merge has its own threads, which those would hinder
    from lora_core.errors import LoraError
    from lora_core.merge import merge

    if out.exists():
        raise CommandError(f"{out} exists already. Choose another folder with --out.", code="exists")
    out.parent.mkdir(parents=True, exist_ok=True)
    task = progress.add_task("merging", total=None)
    try:
        return merge(
            base,
            adapter,
            out,
            recipe=_recipe(base, adapter, recipe, options.start),
            dtype=None if options.dtype == "base" else options.dtype,
            scale=options.scale,
            shard_size=options.shard_size,
            digests=digests,
            expected=expected,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    except LoraError as error:
        raise CommandError(f"{error.message}.", code=error.code) from None


def _recipe(base: Path, adapter: Path, known: bytes | None, start: Start) -> "Recipe":
    """How the two are merged from this start: as the service knows, or else by names."""
    from lora_core import strict_json
    from lora_core.plan import from_nf4, plan_merge
    from lora_core.recipe import Recipe
    from lora_core.shards import open_checkpoint

    if known is None:
        return plan_merge(base, adapter, start=start).recipe
    recipe = Recipe.from_json(known)
    if start == "original":
        return recipe
    return from_nf4(recipe, open_checkpoint(base).tensors(), strict_json.loads((base / "config.json").read_bytes()))


def merge_here(
    client: Client,
    version: Version,
    base: Path,
    out: Path,
    *,
    options: MergeOptions,
    any_base: bool,
    progress: Progress,
) -> str:
    """Fetch the adapter alone, merge it into the folder `base`, and compare the result with the server's digests.

    The base must have the registered bytes unless `any_base`. Returns what was done, and leaves it in `out` too.
    """
    name, number = version["adapter"], version["version"]
    if out.exists():
        raise CommandError(f"{out} exists already. Choose another folder with --out.", code="exists")
    registered = client.base_model(version["base_model"])
    is_registered = not (differing := _differing(base, registered))
    if differing and not any_base:
        message = f"{base} is not {registered['name']} as it is registered: {differing[0]} differs or is missing."
        raise CommandError(f"{message} --allow-other-base merges all the same.", code="other_base")
    expected = _stored_digests(client, name, number, options) if is_registered else {}
    recipe = client.merge_recipe(name, number) if is_registered else None
    with tempfile.TemporaryDirectory(prefix="lora-depot-") as scratch:
        adapter = Path(scratch, "adapter")
        files = version["files"]
        download(files, lambda path: client.version_link(name, number, path), adapter, progress=progress)
        with _only(base, registered if is_registered else None) as source:
            report = fold(
                source,
                adapter,
                out,
                options=options,
                progress=progress,
                recipe=recipe,
                digests=True,
                expected=expected,
            )
    record = {
        "adapter": version["ref"],
        "adapter_digest": version["digest"],
        "base_model": registered["name"],
        "base_digest": registered["digest"],
        "base_is_registered": is_registered,
        "other_base_allowed": any_base,
        **asdict(options),
        "compared_with_server": sorted(expected),
        "files": {file.path: file.sha256 for file in report.files},
    }
    (out / REPORT_FILE).write_text(json.dumps(record, indent=2) + "\n")
    if expected:
        checked = "every file has the SHA-256 of the merge that the server stored"
    elif is_registered:
        checked = "the base is the registered one; the server stored no such merge to compare with"
    else:
        checked = f"the base is NOT {registered['name']} as it is registered"
    return f"{version['ref']} merged is in {out} ({len(report.files)} files; {checked})."


def _differing(folder: Path, registered: BaseModelInfo) -> list[str]:
    """Files of the registered base that the folder lacks or has with other bytes."""
    wanted = {file["path"]: file["sha256"] for file in registered["files"]}
    if f"sha256:{folder_digest(wanted)}" != registered["digest"]:
        raise CommandError(f"The server's list of {registered['name']} does not fit its digest.", code="bad_listing")
    if strange := [path for path in wanted if Path(path).name != path]:
        raise BadDownload(f"The server names a file {strange[0][:80]!r}, which is no plain file name.")
    if not folder.is_dir():
        raise CommandError(f"{folder} is not a folder.", code="not_found")
    return sorted(path for path, digest in wanted.items() if not _is(folder / path, digest))


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_of(path) == digest


def _stored_digests(client: Client, name: str, number: int, options: MergeOptions) -> dict[str, str]:
    """What the files of the merge must hash to, as far as the server knows and can say now."""
    try:
        files = client.merged(name, number, options)["files"]
    except Refused as refusal:
        if refusal.status != 503:
            raise
        return {}
    return {file["path"]: file["sha256"] for file in files if file["sha256"]}


@contextmanager
def _only(folder: Path, registered: BaseModelInfo | None) -> Iterator[Path]:
    """A folder with nothing but the registered files of `folder`; other files there could change what a merge reads."""
    if registered is None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="lora-depot-") as view:
        for file in registered["files"]:
            Path(view, file["path"]).symlink_to((folder / file["path"]).absolute())
        yield Path(view)
