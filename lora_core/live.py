"""One base in memory and many adapters beside it: one of them at a time, or another one for each row of a batch.

Attached, an adapter's layers stand in the model where the base's modules stood; merged, the base's modules have other
weights. The base's own tensors are never written to: what was taken away is put back, so it is the same bit for bit
after any number of switches, and a matrix that two modules share is changed for the adapted one only.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn

from lora_core.adapter import read_layers
from lora_core.adapter_names import PREFIX
from lora_core.addition import add_deltas, adds_product
from lora_core.config import LoraConfig
from lora_core.errors import BadConfig, UnknownAdapter
from lora_core.gate import CONFIG_FILE, WEIGHTS_FILE, AdapterForm, read_config_bytes
from lora_core.header import ADAPTER_HEADER_BYTES, header_length
from lora_core.inject import adapter_layers
from lora_core.layer import AdapterLayer, LoraLayer
from lora_core.mixed import mixed_layers
from lora_core.tensors import FileTensors, is_zero

How = Literal["attached", "merged"]


@dataclass(frozen=True)
class _Spot:
    """Where a module of the base stands."""

    parent: nn.Module
    child: str
    base: nn.Module

    def put(self, module: nn.Module) -> None:
        setattr(self.parent, self.child, module)


@dataclass
class _Loaded:
    """`head` are the bytes that tell all about the adapter but its numbers.

    `factors` are all tensors by their names in the file, where there is nothing but factors, float32 as in the file,
    and no layer keeps a result; they lie in the memory of `file`. Empty and None for other adapters.
    """

    form: AdapterForm
    layers: Mapping[str, AdapterLayer]
    head: bytes
    factors: Mapping[str, Tensor]
    file: FileTensors | None

    def is_plain(self) -> bool:
        """Whether other numbers in the same places make another adapter of it."""
        return bool(self.factors) and all(factor.is_cpu for factor in self.factors.values())


class LiveModel:
    """`model` with adapters in memory, for inference: it is frozen. Not for several threads at once.

    `active` is the adapter at work, None for the base; `how` says whether its layers are attached or its product
    is merged into weights. Move the model to its device before adapters are loaded.
    """

    def __init__(self, model: nn.Module) -> None:
        if adapter_layers(model):
            raise BadConfig("the model has adapted layers already; eject them first")
        self.model = model.requires_grad_(requires_grad=False)
        self.active: str | None = None
        self.how: How = "attached"
        self._adapters: dict[str, _Loaded] = {}
        self._spots: dict[str, _Spot] = {}
        self._placed: Mapping[str, nn.Module] = {}
        self._originals: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._buffers: dict[tuple[str, str], nn.Parameter] = {}
        self._spare: FileTensors | None = None
        self._mixed = False

    @property
    def adapters(self) -> dict[str, LoraConfig]:
        """What is loaded, by name."""
        return {name: loaded.form.facts.config for name, loaded in self._adapters.items()}

    @property
    def buffer_bytes(self) -> int:
        """Memory that merged weights take, beside the base's; kept for the next merge until `free_buffers`."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def load(self, name: str, directory: Path) -> LoraConfig:
        """Read the adapter in `directory` under a new name; the model goes on as it was. Errors: as `load_adapter`."""
        if name in self._adapters:
            raise BadConfig(f"an adapter {name} is loaded already; drop it first")
        self._adapters[name] = loaded = self._read(directory)
        return loaded.form.facts.config

    def replace(self, name: str, directory: Path) -> LoraConfig:
        """Read the adapter in `directory` in the place of a loaded one, which goes on as it was if this fails.

        Where the two differ in nothing but numbers, only these are read, and tensors of the former are used again.
        """
        loaded = self._find(name)
        self._check_not_mixed()
        refills = loaded.is_plain() and _head(directory) == loaded.head
        if refills:
            self._refill(loaded, directory)
        else:
            self._adapters[name] = loaded = self._read(directory)
        if self.active == name and self.how == "merged":
            self.merge(name)
        elif self.active == name and not refills:
            self.use(name)
        return loaded.form.facts.config

    def drop(self, name: str) -> None:
        """Forget an adapter. The base is at work afterwards if it was this one's turn."""
        self._find(name)
        if self.active == name:
            self.use(None)
        del self._adapters[name]

    def use(self, name: str | None) -> None:
        """Attach an adapter in place of the one at work; None is the base, bit for bit. Touches no number."""
        layers = self._find(name).layers if name is not None else {}
        self._check_not_mixed()
        self._restore()
        self._place(layers)
        self.active, self.how = name, "attached"

    @torch.no_grad()
    def merge(self, name: str) -> list[str]:
        """Give the adapted modules the weights W + ΔW, rounded once: the model is as fast as the base then.

        Returns the paths of modules that are attached all the same: they have no one weight to add to, or are
        replaced as a whole. A sum that is too large for the weights' dtype is NonFinite, and the base is at work then.
        """
        layers = self._find(name).layers
        self._check_not_mixed()
        self._restore()
        self.active = None
        merged = {path: layer for path, layer in layers.items() if _can_merge(layer)}
        attached = {path: layer for path, layer in layers.items() if path not in merged}
        self._place(attached)
        try:
            self._merge_layers(merged)
        except BaseException:
            self.use(None)
            raise
        self.active, self.how = name, "merged"
        return sorted(attached)

    def free_buffers(self) -> None:
        """Give back the memory of merged weights; a merged adapter is attached instead."""
        if self.how == "merged":
            self.use(self.active)
        self._buffers.clear()

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within the block, row i of every batch is the business of the adapter names[i], or of the base for None.

        A batch of another number of rows is ShapeMismatch. Afterwards, what was at work before is again.
        """
        adapters = {name: self._find(name).layers for name in dict.fromkeys(names) if name is not None}
        with self._base():
            self._place(mixed_layers(names, adapters))
            self._mixed = True
            try:
                yield
            finally:
                self._mixed = False

    def _check_not_mixed(self) -> None:
        if self._mixed:
            raise BadConfig("rows have their adapters until the block ends; change them before or after it")

    @contextmanager
    def _base(self) -> Iterator[None]:
        """The base within, and afterwards what was at work before."""
        self._check_not_mixed()
        placed = self._placed
        swapped = [(module, name, getattr(module, name)) for module, name, _ in self._originals]
        self._restore()
        self._place({})
        try:
            yield
        finally:
            self._place(placed)
            for module, name, buffer in swapped:
                self._swap(module, name, buffer)

    def _read(self, directory: Path) -> _Loaded:
        head = _head(directory)
        with self._base():
            form, layers, file = read_layers(self.model, directory)
        for layer in layers.values():
            layer.requires_grad_(requires_grad=False)
        factors = _factors(form, layers)
        return _Loaded(form, layers, head, factors, file if factors else None)

    def _refill(self, loaded: _Loaded, directory: Path) -> None:
        """Other numbers for the same layers: read beside the old, whose memory waits for the next."""
        header, file = loaded.form.header, self._spare
        if file is None or file.header != header:
            file = FileTensors(header, file.memory if file else None)
        file.read(directory / WEIGHTS_FILE)
        tensors = file.tensors
        loaded.form.check_learned(lambda name: is_zero(tensors[name]))
        for name, factor in loaded.factors.items():
            factor.data = tensors[name]
        self._spare, loaded.file = loaded.file, file

    def _find(self, name: str) -> _Loaded:
        if name not in self._adapters:
            known = ", ".join(sorted(self._adapters)) or "none"
            raise UnknownAdapter(f"no adapter {str(name)[:80]} is loaded; loaded are: {known}")
        return self._adapters[name]

    def _place(self, modules: Mapping[str, nn.Module]) -> None:
        """Put modules into the tree, and the base's back where none is."""
        for path in self._placed.keys() - modules.keys():
            self._spots[path].put(self._spots[path].base)
        for path, module in modules.items():
            if path not in self._spots:
                parent, _, child = path.rpartition(".")
                holder = self.model.get_submodule(parent)
                self._spots[path] = _Spot(holder, child, getattr(holder, child))
            if module.training is not self.model.training:
                module.train(self.model.training)
            self._spots[path].put(module)
        self._placed = modules

    def _restore(self) -> None:
        for module, name, parameter in self._originals:
            setattr(module, name, parameter)
        self._originals.clear()

    def _merge_layers(self, layers: Mapping[str, LoraLayer]) -> None:
        weights = {path: self._buffer(path, "weight", layer.base_layer.weight) for path, layer in layers.items()}
        add_deltas((layer, weights[path]) for path, layer in layers.items())
        for path, layer in layers.items():
            bias = layer.bias_to_add()
            self._swap(layer.base_layer, "weight", weights[path])
            if bias is not None:
                buffer = self._buffer(path, "bias", layer.base_layer.bias)
                buffer.copy_(bias)
                self._swap(layer.base_layer, "bias", buffer)

    def _buffer(self, path: str, name: str, original: Tensor) -> nn.Parameter:
        if (path, name) not in self._buffers:
            self._buffers[path, name] = nn.Parameter(torch.empty_like(original), requires_grad=False)
        return self._buffers[path, name]

    def _swap(self, module: nn.Module, name: str, buffer: nn.Parameter) -> None:
        self._originals.append((module, name, getattr(module, name)))
        setattr(module, name, buffer)


def _head(directory: Path) -> bytes:
    """The config, and size and header of the weights; nothing where one is missing."""
    weights = directory / WEIGHTS_FILE
    if not weights.is_file() or not (directory / CONFIG_FILE).is_file():
        return b""
    with weights.open("rb") as file:
        size, prefix = os.fstat(file.fileno()).st_size, file.read(8)
        header = file.read(header_length(prefix, max_bytes=ADAPTER_HEADER_BYTES))
        return b"%d " % size + prefix + header + read_config_bytes(directory)


def _factors(form: AdapterForm, layers: Mapping[str, AdapterLayer]) -> dict[str, Tensor]:
    """`_Loaded.factors`."""
    if {info.dtype for info in form.header.tensors} != {"F32"} or not all(map(adds_product, layers.values())):
        return {}
    found = {
        f"{PREFIX}{path}.{name}": tensor
        for path, layer in layers.items()
        for name, tensor in layer.adapter_tensors().items()
    }
    return found if found.keys() == {info.name for info in form.header.tensors} else {}


def _can_merge(layer: AdapterLayer) -> TypeGuard[LoraLayer]:
    weight = getattr(layer.base_layer, "weight", None)
    return isinstance(layer, LoraLayer) and isinstance(weight, nn.Parameter) and weight.is_floating_point()
