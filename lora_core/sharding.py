"""A frozen base in pieces over all processes of a group (FSDP2): a layer is whole only while it computes.

What is trained stays whole in every process, so gradients, the optimizer, checkpoints and adapter files are the same
as without. For machines of which none can hold the base.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_core.distributed import LOSS_SUM
from lora_core.errors import BadConfig
from lora_core.qlora import NF4Weight
from lora_core.task import Task
from lora_core.trainable import trained_parameters


def shard_base(model: Any, *, device: torch.device | str | None = None) -> None:
    """Keep 1/n of every frozen parameter in each of the n processes of the group, on `device`, by default where it is.

    Call it in every process, after `inject` and before `train`. Layer after layer goes to the device, so a base that
    is loaded in main memory needs no device that holds it. BadConfig if the model cannot be sharded; nothing is changed
    then.
    """
    layers = sharded_layers(model)
    _require_shardable(model, layers)
    where = torch.device(device or model.device)
    trained = set(trained_parameters(model).values())
    for parameter in trained:
        parameter.data = parameter.data.to(where)
    mesh = init_device_mesh(where.type, (dist.get_world_size(),))
    for unit in (*layers, model):
        fully_shard(unit, mesh=mesh, ignored_params=trained)
    # Losses read the output layer's weight without calling the model, which is what would make it whole.
    setattr(model, LOSS_SUM, MethodType(_loss_sum, model))
    register_fsdp_forward_method(model, LOSS_SUM)


def sharded_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that become whole one at a time: transformers' layers. The rest is whole while a loss is computed."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inner = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, GradientCheckpointingLayer) and not inner:
            found[path] = module
    return list(found.values())


def base_bytes(model: nn.Module) -> int:
    """What this process keeps of the frozen parameters."""
    kept = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return sum((part.to_local() if isinstance(part, DTensor) else part).nbytes for part in kept)


def _require_shardable(model: nn.Module, layers: list[nn.Module]) -> None:
    if not dist.is_initialized():
        raise BadConfig("sharding needs a process group: start with torchrun and call init_process_group")
    if isinstance(model, FSDPModule):
        raise BadConfig("the base is sharded already")
    if not layers:
        raise BadConfig(f"{type(model).__name__} has no layers that are known here, so it cannot be sharded")
    if not trained_parameters(model):
        raise BadConfig("the model has nothing to train; inject an adapter before the base is sharded")
    if any(isinstance(parameter, NF4Weight) for parameter in model.parameters()):
        raise BadConfig("a base in 4 bits (QLoRA) cannot be sharded; each process keeps it whole")


def _loss_sum(model: Any, task: Task, batch: Any) -> Tensor:
    return task.loss_sum(model, batch)
