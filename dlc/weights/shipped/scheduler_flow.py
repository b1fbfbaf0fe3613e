"""Euler's method for models that predict a flow's velocity, as a scheduler of diffusers for DiTPipeline and its like.

This file lies beside weights that `python -m dlc.checkpoints export` wrote; the pipeline above it loads it.
"""

import shutil
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler


class FlowScheduler(FlowMatchEulerDiscreteScheduler):
    """At evenly spaced times from 1, which is noise, to 0; the model is told num_train_timesteps times these."""

    init_noise_sigma = 1.0

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None, **kwargs) -> None:
        """As of FlowMatchEulerDiscreteScheduler, whose own times end before 0."""
        sigmas = [(num_inference_steps - step) / num_inference_steps for step in range(num_inference_steps)]
        super().set_timesteps(sigmas=sigmas, device=device, **kwargs)

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        """The model takes x_t as it is."""
        return sample

    def save_pretrained(self, save_directory: str, *args, **kwargs) -> None:
        """As of SchedulerMixin, with this file beside its config."""
        super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copy(__file__, Path(save_directory) / "scheduler_flow.py")


FlowScheduler.__module__ = "scheduler_flow"  # the name by which a pipeline that is saved again finds this file
