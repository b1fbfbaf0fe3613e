"""Images from discrete latent codes (Lavoie et al. 2025, arXiv 2507.12318), as a diffusers pipeline.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    images = pipe(dlcs=codes, guidance_scale=1.5, num_inference_steps=25, generator=torch.manual_seed(0)).images

This file lies beside weights that `python -m dlc.checkpoints export` wrote.
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class DLCDiTPipeline(DiffusionPipeline):
    """A transformer over codes, the VAE of its latents, and a scheduler of noise prediction."""

    model_cpu_offload_seq = "transformer->vae"

    def __init__(self, transformer: torch.nn.Module, vae: torch.nn.Module, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        dlcs: torch.Tensor | list,
        guidance_scale: float = 1.5,
        num_inference_steps: int = 25,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw an image for each code.

        Args:
            dlcs: codes (N, L), each token in 0..V-1; V is the null token, of which guidance makes use.
            guidance_scale: classifier-free guidance on all latent channels; 1 disables it.
            generator: one torch.Generator, or one per code.
            latents: the noise (N, C, h, w) to begin with, in place of the generator's.
            output_type: "pil", "np" or "pt", images in [0, 1], or "latent".
        """
        config, device, dtype = self.transformer.config, self._execution_device, self.transformer.dtype
        given = torch.as_tensor(dlcs, device=device)
        codes, shape = given.long(), (*given.shape[:1], config.L)
        if given.shape != shape or (codes != given).any() or codes.min() < 0 or codes.max() >= config.V:
            raise ValueError(f"dlcs: wanted codes (N, {config.L}) of tokens from 0 to {config.V - 1}")
        shape = (len(codes), config.in_channels, config.input_size, config.input_size)
        x = randn_tensor(shape, generator, device, dtype) if latents is None else latents.to(device, dtype)
        guided = guidance_scale > 1
        y = torch.cat([codes, torch.full_like(codes, config.V)]) if guided else codes

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = x * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            eps = self.transformer(scaled, t.expand(len(scaled)), y)[:, : config.in_channels]
            if guided:
                conditional, null = eps.chunk(2)
                eps = null + guidance_scale * (conditional - null)
            x = self.scheduler.step(eps, t, x).prev_sample
        images = x if output_type == "latent" else self.decoded(x)
        images = VaeImageProcessor().postprocess(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def decoded(self, x: torch.Tensor) -> torch.Tensor:
        """Latents to images, about in [-1, 1]."""
        config = self.vae.config
        shift = config.get("latents_mean") or config.get("shift_factor") or 0.0
        shift, scale = (torch.tensor(one).to(x).view(-1, 1, 1) for one in (shift, config.get("latents_std") or 1.0))
        return self.vae.decode((x / config.scaling_factor * scale + shift).to(self.vae.dtype)).sample

    def save_pretrained(self, save_directory: str, *args, **kwargs) -> None:
        """As of DiffusionPipeline, with this file, which model_index.json names."""
        super().save_pretrained(save_directory, *args, **kwargs)
        index = Path(save_directory) / "model_index.json"
        values = json.loads(index.read_text())
        index.write_text(json.dumps(dict(values, _class_name=["pipeline_dlc", "DLCDiTPipeline"]), indent=2) + "\n")
        shutil.copy(__file__, Path(save_directory) / "pipeline_dlc.py")
