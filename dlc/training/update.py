"""Gradient clipping, the EMA update and the count of skipped fp16 steps, none of which makes the CPU wait.

The fp16 scaler skips a step whose gradients are not finite, which only the device knows at that time. The CPU waits for
it in `SkippedSteps.read` alone.
"""

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn


def clip_gradients(weights: list[torch.Tensor], limit: float) -> torch.Tensor:
    """Scale the gradients of all weights so that their norm together is at most limit; 0: leave them. Returns the norm
    that they had. Weights that no gradient reached are left out."""
    weights = [weight for weight in weights if weight.grad is not None]
    norm = get_total_norm([weight.grad for weight in weights])
    if limit:
        clip_grads_with_norm_(weights, limit, norm)
    return norm


@torch.no_grad()
def update_ema(
    averages: list[torch.Tensor], weights: list[torch.Tensor], decay: float, skipped: torch.Tensor | None = None
) -> None:
    """averages = decay * averages + (1 - decay) * weights, in place; unchanged if `skipped`, a bool (), is set."""
    if skipped is None:
        get_ema_multi_avg_fn(decay)(averages, weights, None)
    else:
        move_towards(averages, weights, 1 - decay, skipped)


def move_towards(
    averages: list[torch.Tensor],
    weights: list[torch.Tensor],
    share: float | torch.Tensor,
    skipped: torch.Tensor | None = None,
) -> None:
    """averages += share * (weights - averages), in place; unchanged if `skipped`, a bool (), is set.

    This is a step of SGD on (averages - weights)^2 / 2: torch's fused SGD reads a flag and a share () on the device,
    for all tensors in one kernel; its lerp would take a kernel for each tensor.
    """
    torch._fused_sgd_(
        averages, weights, [], weight_decay=1.0, momentum=0.0, lr=share, dampening=0.0, nesterov=False, maximize=True,
        is_first_step=False, found_inf=None if skipped is None else skipped.float(),
    )  # fmt: skip


class SkippedSteps:
    """Takes the optimizers' steps, and counts on the device those that the fp16 scaler skips.

    Args:
        optimizers: torch's own. The kernels of those with fused=True read the scaler's finding and leave all as it is;
            for others the scaler waits for the device.
        scaler: torch's GradScaler, or None.
        since_line: steps that are already counted since the log's last line.

    Attributes:
        last: whether the last step was skipped, a bool () tensor; None in a run without a scaler.
    """

    def __init__(
        self,
        optimizers: list[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler | None,
        device: torch.device,
        since_line: int = 0,
    ):
        self.optimizers, self.scaler, self.last = optimizers, scaler, None
        self.counts = torch.tensor([since_line, 0, 0], device=device)

    def step(self) -> None:
        """Take a step with all optimizers. The scaler looks at each one's gradients, and skips by each one's own."""
        for optimizer in self.optimizers:
            self.scaler.step(optimizer) if self.scaler else optimizer.step()
        if self.scaler:
            found = [self.scaler._found_inf_per_device(optimizer).values() for optimizer in self.optimizers]
            self.last = torch.stack([flag for flags in found for flag in flags]).any()
            self.scaler.update()
            since_line, in_a_row, longest = self.counts.unbind()
            in_a_row = (in_a_row + 1) * self.last
            self.counts = torch.stack([since_line + self.last, in_a_row, torch.maximum(longest, in_a_row)])

    def read(self) -> tuple[int, int, int]:
        """Skipped since the log's last line, in a row until now, and the longest such streak. Waits for the device."""
        return tuple(self.counts.tolist())

    def begin_line(self) -> None:
        """Count anew what is skipped since the log's last line."""
        self.counts[0] = 0
