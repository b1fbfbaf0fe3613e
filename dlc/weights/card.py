"""The model card, README.md, beside exported weights."""

import json

from dlc.machine.cli import one_line
from dlc.weights.load import describe
from dlc.weights.meta import RunMeta
from models import DiT

PAPERS = {
    "DiT": " (Peebles & Xie 2023, arXiv 2212.09748)",
    "DiTSEM": " (Lavoie et al. 2025, arXiv 2507.12318)",
    "DiTCONT": " (Lavoie et al. 2025, arXiv 2507.12318)",
}
CONDITIONS = {"labels": "class labels", "codes": "discrete latent codes"}
CARD = """---
license: {license}
pipeline_tag: unconditional-image-generation
{library}tags: [diffusion-transformer, image-generation]
---

# {name}

A {family}, a diffusion transformer{paper} conditioned on {condition}, for latents of {latents}; \
{millions:,.1f} M parameters. Written by dlc-dit from: {said}.

## Use

{usage}

## Model and training

| setting | value |
|---|---|
{rows}

## Licence

{licence}.
"""
PIPELINE = """```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER", trust_remote_code=True)
{codes}noise = torch.Generator().manual_seed(0)
images = pipe({argument}, guidance_scale=1.5, num_inference_steps=25, generator=noise).images
```

The folder's files of code make diffusers compute the function that the weights were trained for; read them before you \
trust them. For the same noise the images are those of `{command} --sampler {sampler} --num-sampling-steps 25 \
--cfg-channels all`."""
UNKNOWN = "Nobody has stated a licence for these weights; that of their authors, and of the weights and data that they \
were trained from, holds"


def model_card(model: DiT, name: str, meta: RunMeta, licence: str, sampler: str | None) -> str:
    """The text of README.md: what the weights are, how to draw from them, how they were trained, their licence.

    sampler: of ours, that draws as the pipeline does; None: there is no pipeline.
    """
    arguments, recorded = model.config["arguments"], dict(step=meta.step, **meta.recorded())
    recorded["versions"] = ", ".join(map(" ".join, (recorded.pop("versions", None) or {}).items()))
    rows = [
        f"| {key} | {one_line(value, 100).replace('|', ' ')} |"
        for key, value in {**arguments, **recorded}.items()
        if value not in (None, "") and not key.endswith(("_path", "_sha256"))  # of no use on another machine
    ]
    script = "sample_ddp.py" if model.conditioning == "labels" else "sample_ddp_computed_dlc.py"
    codes, argument = "", "class_labels=[0]"
    if sampler and model.conditioning == "codes":  # a DiTSEM, whose L and V are arguments
        codes, argument = f"codes = torch.randint({arguments['V']}, (1, {arguments['L']}))", "dlcs=codes"
        codes += "  # for real images, use their codes\n"
    command = f"torchrun --nnodes=1 --nproc_per_node=1 {script} --ckpt THIS_FOLDER"
    usage = PIPELINE.format(codes=codes, argument=argument, command=command, sampler=sampler)
    return CARD.format(
        license=json.dumps(licence),
        library="library_name: diffusers\n" if sampler else "",
        name=name,
        family=type(model).__name__,
        paper=next((PAPERS[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in PAPERS), ""),
        condition=CONDITIONS.get(model.conditioning, model.conditioning),
        latents=" x ".join(map(str, (model.in_channels, *model.x_embedder.img_size))),
        millions=sum(value.numel() for value in model.parameters()) / 1e6,
        said=one_line(describe(meta), 200),
        usage=usage if sampler else f"With dlc-dit: `{command}`.",
        rows="\n".join(rows),
        licence=UNKNOWN if licence == "unknown" else licence,
    )
