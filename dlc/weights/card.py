"""The model card, README.md, beside exported weights."""

import json
from typing import TYPE_CHECKING

from dlc.machine.cli import one_line
from dlc.weights.load import describe

if TYPE_CHECKING:
    from dlc.weights.export import Export

PAPERS = {
    "DiT": "Peebles & Xie 2023, arXiv 2212.09748",
    "DiTSEM": "Lavoie et al. 2025, arXiv 2507.12318",
    "DiTCONT": "Lavoie et al. 2025, arXiv 2507.12318",
}
CONDITIONS = {"labels": "class labels", "codes": "discrete latent codes"}


def model_card(job: "Export") -> str:
    """The text of README.md for an `Export`: what it is, how to draw from it, how it was trained, its licence."""
    model = job.model
    front = ["---", f"license: {json.dumps(job.license)}", "pipeline_tag: unconditional-image-generation"]
    front += ["library_name: diffusers"] if job.format != "safetensors" else []
    front += ["tags: [diffusion-transformer, image-generation]", "---"]
    height, width = model.x_embedder.img_size
    family = next((kind.__name__ for kind in type(model).__mro__ if kind.__name__ in PAPERS), None)
    about = (
        f"A {type(model).__name__}, a diffusion transformer{f' ({PAPERS[family]})' if family else ''} conditioned on "
        f"{CONDITIONS.get(model.conditioning, model.conditioning)}, for latents of {model.in_channels} x {height} x "
        f"{width}; {sum(value.numel() for value in model.parameters()) / 1e6:,.1f} M parameters. Written by dlc-dit "
        f"from: {one_line(describe(job.meta), 200)}."
    )
    recorded = dict(step=job.meta.step, **job.meta.recorded())
    versions = ", ".join(" ".join(pair) for pair in (recorded.pop("versions", None) or {}).items())
    settings = {
        name: value
        for name, value in {**model.config["arguments"], **recorded, "versions": versions}.items()
        if value not in (None, "") and not name.endswith(("_path", "_sha256"))  # of no use on another machine
    }
    rows = [f"| {name} | {one_line(value, 100).replace('|', ' ')} |" for name, value in settings.items()]
    licence = (
        "Nobody has stated a licence for these weights; that of their authors, and of the weights and data that they "
        "were trained from, holds."
        if job.license == "unknown"
        else f"{job.license}."
    )
    sections = [
        "\n".join(front),
        f"# {job.name}",
        about,
        "## Use",
        usage(job),
        "## Model and training",
        "\n".join(["| setting | value |", "|---|---|", *rows]),
        "## Licence",
        licence,
    ]
    return "\n\n".join(sections) + "\n"


def usage(job: "Export") -> str:
    """How to draw from the folder, as Markdown."""
    script = "sample_ddp.py" if job.model.conditioning == "labels" else "sample_ddp_computed_dlc.py"
    command = f"torchrun --nnodes=1 --nproc_per_node=1 {script} --ckpt THIS_FOLDER"
    if job.format == "safetensors":
        return f"With dlc-dit: `{command}`."
    lines = [
        "```python",
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        'pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER", trust_remote_code=True)',
    ]
    condition = "class_labels=[0]"
    if job.model.conditioning == "codes":
        condition, (L, V) = "dlcs=codes", (job.model.config["arguments"][name] for name in ("L", "V"))
        lines.append(f"codes = torch.randint({V}, (1, {L}))  # for real images, use their codes")
    lines += [
        "noise = torch.Generator().manual_seed(0)",
        f"images = pipe({condition}, guidance_scale=1.5, num_inference_steps=25, generator=noise).images",
        "```",
        "",
        "The folder's files of code make diffusers compute the function that the weights were trained for; read them "
        f"before you trust them. For the same noise the images are those of `{command} --sampler {job.sampler} "
        "--num-sampling-steps 25 --cfg-channels all`.",
    ]
    return "\n".join(lines)
