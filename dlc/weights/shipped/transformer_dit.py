"""DiT in diffusers: its own time frequencies, spaced over 128 steps where those of diffusers are over 127, and no label
beyond its classes.

This file lies beside weights that `python -m dlc.checkpoints export` wrote. Load the pipeline above it with

    pipe = DiTPipeline.from_pretrained(FOLDER, trust_remote_code=True)
"""

import shutil
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel


class DiTTransformer(DiTTransformer2DModel):
    """diffusers' DiT, as the weights were trained: `_trained_with` in its config says whose time frequencies."""

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, **kwargs
    ) -> object:
        """As of DiTTransformer2DModel. Raises ValueError for a label that is no class; the null label, 1000, is only
        for the second half of a batch, where DiTPipeline puts it for guidance."""
        classes, (labels, null) = self.config.get("_num_classes", 1000), class_labels.tensor_split(2)
        guided = len(labels) == len(null) and bool((null == 1000).all())
        labels = labels if guided else class_labels
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise ValueError(f"class_labels: {int(wrong[0])} is no class, wanted 0 to {classes - 1}")
        if self.config.get("_trained_with", "dit") == "dit":
            for block in self.transformer_blocks:
                block.norm1.emb.time_proj.downscale_freq_shift = 0
        return super().forward(hidden_states, timestep, class_labels, **kwargs)

    def save_pretrained(self, save_directory: str, *args, **kwargs) -> None:
        """As of DiTTransformer2DModel, with this file beside the weights."""
        super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copy(__file__, Path(save_directory) / "transformer_dit.py")


DiTTransformer.__module__ = "transformer_dit"  # the name by which a pipeline that is saved again finds this file
