"""What a run of training needs beside its loss: sharding, the request to stop."""
import signal

import torch
import torch.distributed as dist

from dlc.runtime import PATIENCE
from dlc.signals import STOPPING, on_first_signal

ASKED = 1000                # beside the signals' numbers: a process asked to stop for a reason of its own


def shard(model, device):
    """Shard a model's parameters over the processes, in place, block by block (FSDP2, torch's fully_shard)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)


@torch.no_grad()
def local(parameters):
    """What of each parameter lies in this process: all of it, or its shard."""
    return [parameter.to_local() if hasattr(parameter, "to_local") else parameter for parameter in parameters]


class StopRequest:
    """A request to stop after a step: Ctrl-C; SIGTERM and SIGUSR1, which clusters send before they take a machine away; or
    `ask`, in any process.

    The processes get the signal at different moments and must stop after the same step, so at each step they tell each
    other on the CPU, and read what was told at the step before: nobody waits.

    Attributes: reason, what this process asked to stop for, None where it did not.
    """

    def __init__(self, num_processes):
        self.signal, self.reason, self.told, self.telling = None, None, None, None
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if num_processes > 1 else None
        on_first_signal(STOPPING, self._receive)

    def _receive(self, number):
        self.signal = self.signal or number

    def ask(self, reason):
        """Stop all processes after this step or the next, with a checkpoint: for an error that leaves time for one."""
        self.signal, self.reason = ASKED, self.reason or reason

    def agreed(self):
        """What all processes are to stop for, a signal's name or "an error", else None. Called by all after each step."""
        number = self.signal or 0
        if self.group is not None:
            told, telling = self.told, self.telling
            self.told = torch.tensor([number])
            self.telling = dist.all_reduce(self.told, dist.ReduceOp.MAX, group=self.group, async_op=True)
            number = 0
            if telling is not None:
                telling.wait()
                number = told.item()
        return None if not number else "an error" if number == ASKED else signal.Signals(number).name
