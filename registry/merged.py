"""Merged checkpoints that are never stored: opened once per process, computed block by block for whoever reads."""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from functools import partial
from typing import Any

from lora_core import strict_json
from lora_core.errors import LoraError
from lora_core.floats import DTYPE_NAMES, Array
from lora_core.gate import CONFIG_FILE, WEIGHTS_FILE
from lora_core.header import ADAPTER_HEADER_BYTES
from lora_core.layout import CONFIG_FILE as BASE_CONFIG_FILE
from lora_core.layout import Computed, read_index
from lora_core.merged import MergedCheckpoint
from lora_core.peft_config import AdapterConfig
from lora_core.plan import from_nf4, make_recipe
from lora_core.recipe import Recipe
from lora_core.shared import Shared
from lora_core.shared_reads import SharedReads
from lora_core.sources import ByteSource, read_all, read_header
from registry.errors import ArtifactCorrupt, MergePreparing, MergesBusy, NotMergeable
from registry.jobs.inputs import BaseInput, StoredFile, VersionInput
from registry.jobs.spec import MergeOptions
from registry.storage import ObjectStore
from registry.storage.digests import digest_chunks
from registry.storage.source import StoredFiles

# Of the arithmetic and the layout: part of every ETag.
_FORMAT = 1
_MAX_DOCUMENT_BYTES = 64 * 2**20
THREADS = 2
CHECKPOINTS_HELD = 8
BASES_HELD = 4
BLOCKS_HELD_BYTES = 64 * 2**20
SPANS_HELD_BYTES = 64 * 2**20
BASE_HELD_BYTES = 32 * 2**20
MAX_READERS = 32
PATIENCE_SECONDS = 5.0

Part = Callable[[], Array]


def etag(version: VersionInput, options: MergeOptions, path: str) -> str:
    """A strong validator of one file: of all that decides its bytes."""
    decisive = [_FORMAT, version.base.digest, version.digest, options.model_dump(), path]
    return f'"m{hashlib.sha256(json.dumps(decisive).encode()).hexdigest()}"'


class VirtualMerges:
    """The merged checkpoints of one process. However many read them, `THREADS` threads compute, `BLOCKS_HELD_BYTES`
    of blocks, `SPANS_HELD_BYTES` of what came from the store and `BASE_HELD_BYTES` of what several checkpoints of one
    base need are kept; a block that several want is computed once, and what they read of their base at about the same
    time is read once."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._opening = ThreadPoolExecutor(1, "merge-open")
        self._computing = ThreadPoolExecutor(THREADS, "merge-compute")
        self._checkpoints: OrderedDict[Hashable, Future[MergedCheckpoint]] = OrderedDict()
        self._lock = threading.Lock()
        self._verified: Shared[bool] = Shared(100_000)
        self._bases: Shared[SharedReads] = Shared(BASES_HELD)
        self._base_parts: Shared[Array] = Shared(BASE_HELD_BYTES, lambda part: part.size)
        self._spans: Shared[bytes] = Shared(SPANS_HELD_BYTES, len)
        self._blocks: Shared[Array] = Shared(BLOCKS_HELD_BYTES, lambda block: block.size)
        self._readers = threading.BoundedSemaphore(MAX_READERS)

    def open(self, version: VersionInput, options: MergeOptions) -> MergedCheckpoint:
        """The checkpoint, once every byte it comes from has been compared with its digest in this process.

        That is a matter of minutes for a large base: MergePreparing says to come back. NotMergeable; ArtifactCorrupt.
        """
        future = self._find(version, options)
        try:
            return future.result(PATIENCE_SECONDS)
        except NotYet:
            raise MergePreparing from None
        except LoraError as error:
            raise NotMergeable(f"This version cannot be merged: {error.message}.", reason=error.code) from error

    def submit(self, part: Part) -> "Future[memoryview]":
        """Have a part of a checkpoint computed. Parts are taken in the order of their coming: readers that ask for
        few at a time share the threads evenly."""
        return self._computing.submit(lambda: part().data)

    def enter(self) -> None:
        """Take one of the places for readers, until `leave`; MergesBusy when there is none."""
        if not self._readers.acquire(blocking=False):
            raise MergesBusy

    def leave(self) -> None:
        self._readers.release()

    def close(self) -> None:
        self._opening.shutdown(cancel_futures=True)
        self._computing.shutdown(cancel_futures=True)

    def _find(self, version: VersionInput, options: MergeOptions) -> "Future[MergedCheckpoint]":
        key = (version.base.digest, version.digest, options)
        with self._lock:
            future = self._checkpoints.get(key)
            if future is None or (future.done() and future.exception() is not None):
                future = self._checkpoints[key] = self._opening.submit(self._open, version, options, key)
            self._checkpoints.move_to_end(key)
            if len(self._checkpoints) > CHECKPOINTS_HELD:
                self._checkpoints.popitem(last=False)
        return future

    def _open(self, version: VersionInput, options: MergeOptions, key: Hashable) -> MergedCheckpoint:
        for file in (*version.base.files, *version.files):
            self._verified.get(file.key, partial(self._verify, file))
        base = self._bases.get(version.base, partial(self._shared_base, version.base)).reader()
        adapter = self._source(version.files)
        recipe = Recipe.from_json(version.recipe.encode()) if version.recipe else plan(base, adapter)
        if options.start == "nf4":
            recipe = from_nf4(recipe, read_index(base).tensors(), read_config(base))
        return _SharedCheckpoint(base, adapter, recipe, options, blocks=self._blocks, key=key)

    def _shared_base(self, base: BaseInput) -> SharedReads:
        return SharedReads(self._source(base.files), self._base_parts, base.digest)

    def _source(self, files: Iterable[StoredFile]) -> ByteSource:
        return StoredFiles(self._store, {file.path: file for file in files}, self._spans)

    def _verify(self, file: StoredFile) -> bool:
        if digest_chunks(self._store.open(file.key)) != (file.sha256, file.size):
            raise ArtifactCorrupt(key=file.key)
        return True


class _SharedCheckpoint(MergedCheckpoint):
    """Blocks come from, and go to, a cache of all checkpoints of the process."""

    def __init__(
        self,
        base: ByteSource,
        adapter: ByteSource,
        recipe: Recipe,
        options: MergeOptions,
        *,
        blocks: Shared[Array],
        key: Hashable,
    ) -> None:
        dtype = None if options.dtype == "base" else DTYPE_NAMES[options.dtype]
        super().__init__(base, adapter, recipe, dtype=dtype, scale=options.scale, shard_size=options.shard_size)
        self._blocks, self._key = blocks, key

    def block(self, piece: Computed, number: int) -> Array:
        return self._blocks.get((self._key, piece.output.name, number), partial(super().block, piece, number))


def plan(base: ByteSource, adapter: ByteSource) -> Recipe:
    """The recipe of a version that was published without one."""
    config = AdapterConfig.from_json(read_all(adapter, CONFIG_FILE, limit=_MAX_DOCUMENT_BYTES) or b"")
    header = read_header(adapter, WEIGHTS_FILE, max_bytes=ADAPTER_HEADER_BYTES)
    if header is None:
        raise NotMergeable
    return make_recipe(read_index(base).tensors(), read_config(base), header, config)


def read_config(base: ByteSource) -> dict[str, Any]:
    """The config.json of a base, which was checked when it was registered."""
    found: dict[str, Any] = strict_json.loads(read_all(base, BASE_CONFIG_FILE, limit=_MAX_DOCUMENT_BYTES) or b"")
    return found
