"""What goes with an optimizer's step, on the device: clipping before it; after it the EMA, and the count of the steps
that the fp16 scaler skipped.

The scaler skips a step whose gradients are not finite, which only the device knows at that time. Nothing here makes the
CPU wait for it but `SkippedSteps.read`.
"""

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn


def clip_gradients(weights: list[torch.Tensor], limit: float) -> torch.Tensor:
    """Scale the gradients of all weights so that their norm together is at most limit; 0: leave them. Returns the norm
    that they had."""
    norm = get_total_norm([weight.grad for weight in weights])
    if limit:
        clip_grads_with_norm_(weights, limit, norm)
    return norm


@torch.no_grad()
def update_ema(averages: list[torch.Tensor], weights: list[torch.Tensor], decay: float, skipped=None):
    """averages = decay * averages + (1 - decay) * weights, in place; unchanged if `skipped`, a bool (), is set."""
    if skipped is None:
        get_ema_multi_avg_fn(decay)(averages, weights, None)
    else:  # the same formula, whose weight is 0 in a skipped step
        weight = torch.full((), 1 - decay, device=skipped.device).masked_fill(skipped, 0)
        torch._foreach_lerp_(averages, weights, [weight] * len(averages))


class SkippedSteps:
    """Steps of a fused optimizer that the fp16 scaler skipped, counted on the device.

    Args:
        optimizer: torch's own, with fused=True, whose kernel then reads the scaler's finding and leaves all as it is.
        since_line: steps that are already counted since the log's last line.

    Attributes:
        last: whether the last step was skipped, a bool () tensor; None in a run without a scaler.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, since_line: int = 0):
        self.last, self.counts = None, torch.tensor([since_line, 0, 0], device=device)
        optimizer.register_step_post_hook(self._count)

    def _count(self, optimizer, args, kwargs):
        found_inf = getattr(optimizer, "found_inf", None)  # which the scaler lends to the optimizer during the step
        if found_inf is not None:
            self.last = found_inf > 0
            since_line, in_a_row, longest = self.counts.unbind()
            in_a_row = (in_a_row + 1) * self.last
            self.counts = torch.stack([since_line + self.last, in_a_row, torch.maximum(longest, in_a_row)])

    def read(self) -> tuple[int, int, int]:
        """Skipped since the log's last line, in a row until now, and the longest such streak. Waits for the device."""
        return tuple(self.counts.tolist())

    def begin_line(self):
        """Count anew what is skipped since the log's last line."""
        self.counts[0] = 0
