"""Parameters sharded over the processes (FSDP2, torch's fully_shard), and the shards that lie in this one."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from accelerate import Accelerator


def fully_shard_blocks(model: torch.nn.Module, device: torch.device) -> None:
    """Shard a model's parameters over all processes, in place: block by block, then what lies outside the blocks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)


@torch.no_grad()
def local_shards(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """This process's shard of each parameter; the whole parameter if it is not sharded."""
    return [parameter.to_local() if hasattr(parameter, "to_local") else parameter for parameter in parameters]


def with_autocast(accelerator: "Accelerator", model: torch.nn.Module) -> Callable:
    """A function that calls the model under autocast, as accelerate's prepare does for a model that is not sharded."""

    def call(*args, **kwargs):
        with accelerator.autocast():
            return model(*args, **kwargs)

    return call
