"""Where a base model comes from: a folder on this machine, or a repository of the Hugging Face Hub."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cli.errors import CommandError
from lora_core.base import DOCUMENTS, MAX_DOCUMENT_BYTES, inspect_base, is_base_file
from lora_core.errors import LoraError
from lora_core.header import read_header
from lora_core.shards import COMPANION_FILES, INDEX_FILE, SINGLE_FILE, shard_names

HUB = "hub:"
Say = Callable[[str], None]


@dataclass(frozen=True)
class BaseFiles:
    """The files to upload, by name, and what to tell the catalogue of their origin. `skipped` stay where they are."""

    files: dict[str, Path]
    skipped: list[str]
    source: str
    revision: str | None


def find_base(origin: str, say: Say) -> BaseFiles:
    """The base model at `origin`: a path, or hub:org/name[@revision]. CommandError says what it lacks."""
    if origin.startswith(HUB):
        return hub_base(origin.removeprefix(HUB), say)
    folder = Path(origin).expanduser()
    if not folder.is_dir():
        raise CommandError(f"{origin} is not a folder. Give one, or hub:org/name for the Hub.", code="not_found")
    return checked(folder, source="upload", revision=None)


def checked(folder: Path, *, source: str, revision: str | None) -> BaseFiles:
    """What of `folder` makes a base model, refused here for the reasons for which the server would refuse it."""
    present = sorted(path.name for path in folder.iterdir() if path.is_file())
    try:
        weights = weight_names(folder)
        names = [name for name in present if name in weights or (is_base_file(name) and not is_weights(name))]
        for name in sorted(weights - set(names)):
            raise CommandError(f"{folder} lacks {name}.", code="invalid_base_model")
        documents = {name: _document(folder / name) for name in DOCUMENTS if name in names}
        inspect_base(names, documents, {name: read_header(folder / name) for name in sorted(weights)})
    except LoraError as error:
        raise CommandError(f"{folder} cannot be used: {error.message}.", code=error.code) from None
    skipped = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name not in names)
    return BaseFiles({name: folder / name for name in names}, skipped, source, revision)


def weight_names(folder: Path) -> set[str]:
    """The safetensors files of the checkpoint: those of the index if there is one."""
    index = folder / INDEX_FILE
    return set(shard_names(_document(index))) if index.is_file() else {SINGLE_FILE}


def is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def hub_base(repo: str, say: Say) -> BaseFiles:
    """Fetches `org/name[@revision]`: small files first, then exactly the weights that belong to the checkpoint."""
    try:
        from httpx2 import TransportError  # the Hub client's own HTTP library
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise CommandError("The Hub needs one more package: pip install 'lora-depot[hub]'.") from None
    name, _, wanted = repo.partition("@")
    try:
        commit = HfApi().model_info(name, revision=wanted or None).sha
        say(f"{name} is at commit {commit}.")
        small = [*DOCUMENTS, *COMPANION_FILES]
        folder = Path(snapshot_download(name, revision=commit, allow_patterns=small))
        weights = sorted(weight_names(folder))
        folder = Path(snapshot_download(name, revision=commit, allow_patterns=[*small, *weights]))
    except HFValidationError:
        raise CommandError(f"{name!r} is not the name of a Hub repository: write hub:org/name.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        raise CommandError(_explain(name, wanted, status), code="hub") from None
    except LoraError as error:
        raise CommandError(f"{name} cannot be used: {error.message}.", code=error.code) from None
    except (TransportError, OSError) as error:
        raise CommandError(f"The Hub does not answer ({type(error).__name__}). Try again.", code="hub") from None
    return checked(folder, source=f"{HUB}{name}", revision=commit)


def _explain(name: str, revision: str, status: int | None) -> str:
    if status in (401, 403, 404):
        at = f" at {revision}" if revision else ""
        return f"The Hub has no repository {name}{at} for you. Check the name, or set HF_TOKEN for a private one."
    return f"The Hub answered with status {status}. Try again later."


def _document(path: Path) -> bytes:
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        raise CommandError(f"{path} is too large to be what its name says.", code="invalid_base_model")
    return path.read_bytes()
