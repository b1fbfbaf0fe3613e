"""DiT's own function in diffusers: its time frequencies are spaced over 128 steps, those of diffusers over 127.

This file lies beside weights that `python -m dlc.checkpoints export` wrote. Load the pipeline above it with

    pipe = DiTPipeline.from_pretrained(FOLDER, trust_remote_code=True)
"""

from diffusers import DiTTransformer2DModel


class DiTTransformer(DiTTransformer2DModel):
    """diffusers' DiT with the time frequencies that the weights were trained with; all else is as there."""

    def forward(self, *args, **kwargs):
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        return super().forward(*args, **kwargs)
