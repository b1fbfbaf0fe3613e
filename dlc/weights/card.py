"""The model card, README.md, beside exported weights."""

from dlc.machine.cli import one_line
from dlc.weights.load import describe

PAPERS = {
    "DiT": "Peebles & Xie 2023, arXiv 2212.09748",
    "DiTSEM": "Lavoie et al. 2025, arXiv 2507.12318",
    "DiTCONT": "Lavoie et al. 2025, arXiv 2507.12318",
}
CONDITIONS = {"labels": "class labels", "codes": "discrete latent codes", "vectors": "vectors"}
SETTINGS = (
    "step",
    "image_size",
    "num_classes",
    "L",
    "V",
    "in_dim",
    "code_init",
    "features_count",
    "latents",
    "vae",
    "scaling_factor",
    "shift_factor",
    "global_batch_size",
    "global_seed",
    "precision",
    "lr",
    "weight_decay",
    "ema_decay",
)


def model_card(job) -> str:
    """The text of README.md for an `Export`: what it is, how to draw from it, how it was trained, its licence."""
    family, model = type(job.model).__name__, job.model
    front = ["---", f"license: {job.license}", "pipeline_tag: unconditional-image-generation"]
    front += ["library_name: diffusers"] if job.format != "safetensors" else []
    front += ["tags: [diffusion-transformer, image-generation]", "---"]
    height, width = model.x_embedder.img_size
    condition = CONDITIONS.get(model.conditioning, model.conditioning)
    about = (
        f"A diffusion transformer ({PAPERS.get(family, family)}) conditioned on {condition}, for latents of "
        f"{model.in_channels} x {height} x {width}; {sum(value.numel() for value in model.parameters()) / 1e6:,.1f} M "
        f"parameters. Written by dlc-dit from: {one_line(describe(job.meta), 200)}."
    )
    recorded = dict(job.model.config["arguments"], step=job.meta.step, **job.meta.recorded())
    settings = [
        f"| {name} | {one_line(recorded[name], 100).replace('|', ' ')} |"
        for name in SETTINGS
        if recorded.get(name) is not None
    ]
    if recorded.get("versions"):
        settings.append(
            "| versions | " + one_line(", ".join(" ".join(pair) for pair in recorded["versions"].items()), 200) + " |"
        )
    training = (
        ["| setting | value |", "|---|---|", *settings] if settings else ["The file does not say how it was trained."]
    )
    licence = (
        "The file that these weights come from does not record their licence; that of their authors holds."
        if job.license == "unknown"
        else f"{job.license}."
    )
    sections = [
        "\n".join(front),
        f"# {job.name}",
        about,
        "## Use",
        usage(job),
        "## Training",
        "\n".join(training),
        "## Licence",
        licence,
    ]
    return "\n\n".join(sections) + "\n"


def usage(job) -> str:
    """How to draw from the folder, as Markdown."""
    script = "sample_ddp.py" if job.model.conditioning == "labels" else "sample_ddp_computed_dlc.py"
    command = f"torchrun --nnodes=1 --nproc_per_node=1 {script} --ckpt THIS_FOLDER"
    if job.format == "safetensors":
        return f"With dlc-dit: `{command}`."
    sampler = "--sampler dpmsolver++ --num-sampling-steps 25 --cfg-channels all"
    condition = "class_labels=[0]" if job.model.conditioning == "labels" else "dlcs=codes"
    exact = job.format == "diffusers"
    lines = [
        "```python",
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER"{", trust_remote_code=True" if exact else ""})',
    ]
    if job.model.conditioning == "codes":
        L, V = job.model.condition_embedder.L, job.model.condition_embedder.V
        lines.append(f"codes = torch.randint({V}, (1, {L}))  # in earnest, codes of images")
    lines += [
        "noise = torch.Generator().manual_seed(0)",
        f"images = pipe({condition}, guidance_scale=1.5, num_inference_steps=25, generator=noise).images",
        "```",
    ]
    words = (
        "The folder's files of code make diffusers compute the function that the weights were trained for; read them "
        f"before you trust them. For the same noise the images are those of `{command} {sampler}`."
        if exact
        else "diffusers' own class computes a function that is a little off the one that the weights were trained for."
    )
    return "\n".join([*lines, "", words])
