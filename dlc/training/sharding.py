"""Parameters sharded over the processes (FSDP2, torch's fully_shard), and the shards that lie in this one."""

import warnings
from collections.abc import Iterable

import torch
import torch.distributed as dist

from dlc.machine.processes import PRECISIONS


def fully_shard_blocks(model: torch.nn.Module, device: torch.device, precision: str = "fp32") -> None:
    """Shard a model's parameters over all processes, in place: block by block, if it has any, then what lies outside.

    Blocks are gathered in this precision, their LayerNorms' weights as well, and once per step: their gradients are
    summed in float32. What lies outside, such as the code table, stays float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # a linear layer's output may be a view; nothing here changes one in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(PRECISIONS[precision], torch.float32, cast_forward_inputs=False)
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


@torch.no_grad()
def local_shards(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """This process's shard of each parameter; the whole parameter if it is not sharded."""
    return [parameter.to_local() if hasattr(parameter, "to_local") else parameter for parameter in parameters]
