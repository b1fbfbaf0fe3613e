"""Images per second of sampling: a baseline, then sample_ddp_computed_dlc.py with one option after the other.

    python -m benchmarks.sampling

benchmarks/README.md says what the baseline does and what the columns are. The script's rate is read off the times at
which it wrote its PNGs, without the first batch, which compiles, nor, of three and more, the second: the first one's
are late, because they are the first that are decoded. The model is trained for a few steps on random latents, so that
what it draws stays within bounds; the VAE has the shape of Stable Diffusion's and random weights.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from benchmarks.extraction import write_networks
from benchmarks.record import (
    DEVICE,
    ON_GPU,
    flags,
    flags_of,
    forward_flops,
    peak_flops,
    record,
    run_script,
    synchronize,
)
from diffusion import create_diffusion
from diffusion.process_table import OBJECTIVES, create_process
from dlc.data.images import read_png, save_png, to_uint8
from dlc.machine.noise import Stream, normal
from dlc.machine.processes import PRECISIONS, autocast
from dlc.nets.vae import decode
from dlc.sampling.latents import create_sampler
from dlc.sampling.pictures import png_path
from dlc.weights.load import load_model
from dlc.weights.networks import load_vae
from models import DiT_models

STEPS, CFG_SCALE, INTERVAL = 250, 1.5, (250, 749)  # the interval holds half of the steps
TRAINING_STEPS, EULER = 100, (5, 10, 25)  # of flow matching, which is drawn without guidance

FULL, HALF, BASELINE = "full guidance", "guidance in half the steps", "baseline"
HALVED = flags(t_min=INTERVAL[0], t_max=INTERVAL[1])
ROWS = [  # name, precision, flags, the row whose images these should be
    (FULL, "fp32", [], (BASELINE, "fp32")),
    (FULL, "bf16", [], (BASELINE, "fp32")),
    (FULL, "fp16", [], (BASELINE, "fp32")),  # on GPUs alone: a CPU may compute it one number at a time
    (f"{FULL}, VAE too", "bf16", ["--vae-precision", "bf16"], (BASELINE, "fp32")),
    (HALF, "fp32", HALVED, None),
    (HALF, "bf16", HALVED, (HALF, "fp32")),
    *((f"flow, Euler-{n}", "fp32", flags(objective="flow", num_sampling_steps=n, cfg_scale=1), None) for n in EULER),
    ("DDIM-50", "fp32", ["--sampler", "ddim"], None),
    ("DDIM-50", "bf16", ["--sampler", "ddim"], ("DDIM-50", "fp32")),
    ("DPM-Solver++-25", "fp32", ["--sampler", "dpmsolver++"], None),
    ("DPM-Solver++-25", "bf16", ["--sampler", "dpmsolver++"], ("DPM-Solver++-25", "fp32")),
    (f"{FULL}, CUDA graphs", "bf16", ["--cuda-graphs"], (BASELINE, "fp32")),  # on GPUs alone
]


def rough_checkpoint(path: Path, objective: str, args: argparse.Namespace) -> None:
    """Write a model after a few steps on random latents and codes."""
    torch.manual_seed(0)
    process = create_process(OBJECTIVES[objective])
    model = DiT_models[args.model](L=args.L, V=args.V, **process.model_arguments).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4 if "XL" in args.model else 1e-3)
    for _ in range(TRAINING_STEPS):
        x = torch.randn(8, 4, 32, 32, device=DEVICE)
        t = process.training_times(torch.rand(8, dtype=torch.float64, device=DEVICE))
        y = torch.randint(args.V, (8, args.L), device=DEVICE)
        with autocast(DEVICE, "bf16" if ON_GPU else "fp32"):
            loss = process.training_losses(model, x, t, dict(y=y))["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    safetensors.torch.save_file(model.cpu().state_dict(), path / f"{objective}.safetensors")


@torch.no_grad()
def draw_baseline(root: Path, folder: Path, args: argparse.Namespace) -> float:
    """Images a second, after the first batch."""
    model, _, _ = load_model(root / "ddpm.safetensors")
    model, vae = model.to(DEVICE), load_vae(str(root / "vae"), DEVICE)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    diffusion, codes = create_diffusion(str(STEPS)), torch.from_numpy(np.load(root / "codes.npy")).to(DEVICE)
    folder.mkdir()
    for batch in range(args.batches):
        if batch == 1:
            start = time.perf_counter()
        indices = torch.arange(batch * args.batch, (batch + 1) * args.batch, device=DEVICE)
        draws = iter([0, *range(STEPS, 0, -1)])
        y = torch.cat([codes[indices], model.null_condition(args.batch)])
        latents = diffusion.p_sample_loop(
            model.forward_with_cfg,
            (2 * args.batch, 4, 32, 32),
            clip_denoised=False,
            device=DEVICE,
            model_kwargs=dict(y=y, cfg_scale=CFG_SCALE),
            randn_like=lambda x, indices=indices, draws=draws: normal(
                0, Stream.SAMPLE_NOISE, indices, (4, 32, 32), next(draws)
            ).repeat(2, 1, 1, 1),
        )[: args.batch]
        for index, image in zip(indices.tolist(), to_uint8(decode(vae, latents)).cpu().numpy()):
            save_png(png_path(folder, index), image)
        synchronize()
    return args.batch * (args.batches - 1) / (time.perf_counter() - start)


def script(root: Path, folder: Path, precision: str, given: list[str], args: argparse.Namespace) -> tuple[float, Path]:
    """Images per second of the script, after its first batches, and the folder of its PNGs."""
    count = args.batch * args.batches
    command = flags(
        model=args.model, ckpt=root / f"{objective_of(given)}.safetensors",
        dlc_dir=root / "codes.npy", dlc_order="sequential",
        vae=root / "vae", sample_dir=folder, num_fid_samples=count, per_proc_batch_size=args.batch,
        cfg_scale=CFG_SCALE, precision=precision,
    )  # fmt: skip
    run_script("sample_ddp_computed_dlc.py", *command, "--compile", *given)
    (folder,) = (path for path in folder.iterdir() if path.is_dir())
    written = [png_path(folder, index).stat().st_mtime for index in range(count)]
    before = args.batch * min(2, args.batches - 1)
    return (count - before) / (max(written) - max(written[:before])), folder


def prepare(root: Path, args: argparse.Namespace) -> None:
    """Write the VAE, the models and the codes that the rows share."""
    write_networks(root, encoder=False)
    for objective in {objective_of(given): None for _, _, given, _ in ROWS}:
        rough_checkpoint(root, objective, args)
    np.save(root / "codes.npy", torch.randint(args.V, (args.batch * args.batches, args.L)).numpy())


def objective_of(given: list[str]) -> str:
    """What the model was trained on that a row's flags draw from."""
    return given[given.index("--objective") + 1] if "--objective" in given else "ddpm"


def sampler_of(given: list[str]) -> tuple:
    """The sampler that a row's flags ask for, and in how many of the model's calls guidance acts."""
    values = dict(zip(given[::2], given[1::2]))
    process = create_process(OBJECTIVES[objective_of(given)])
    sampler = create_sampler(values.get("--sampler"), int(values.get("--num-sampling-steps", 0)), process)
    bounds = INTERVAL if "--t-min" in given else (0, 999)
    guided = "--cfg-scale" not in given  # the rows that give it turn guidance off
    return sampler, guided and sum(bounds[0] <= time <= bounds[1] for time in sampler.times)


def main() -> None:
    parser, add = flags_of(__doc__)
    add("--model", "measure this DiTSEM", "DiTSEM-XL/2", "DiTSEM-S/2")
    add("--L", "take this many code positions", 512)
    add("--V", "take this many tokens per position", 256)
    add("--batch", "draw this many images at once", 64, 4)
    add("--batches", "draw this many batches per row, see above", 3, 2)
    args = parser.parse_args()
    if ON_GPU:
        torch.backends.cuda.matmul.allow_tf32 = True  # as in sampling
    precisions = PRECISIONS if ON_GPU else ("fp32", "bf16")
    peaks = {name: peak_flops(name, 8192 if ON_GPU else 4096) for name in precisions}
    flops = forward_flops(DiT_models[args.model](L=args.L, V=args.V), 32)
    table, folders = [], {}
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        prepare(root, args)
        for name, precision, given, reference in [(BASELINE, "fp32", [], None), *ROWS]:
            if precision not in precisions or "--cuda-graphs" in given and not ON_GPU:
                continue
            folder = root / f"{len(table)}"
            if name == BASELINE:
                rate = draw_baseline(root, folder, args)
            else:
                rate, folder = script(root, folder, precision, given, args)
            folders[name, precision] = folder
            sampler, guided = sampler_of(given)
            row = {
                **{"": name, "precision": precision, "steps": sampler.num_steps, "guided": guided},
                "images/s": rate,
                "times the first": rate / (table[0]["images/s"] if table else rate),
                "share of peak": rate * (len(sampler.times) + guided) * flops / peaks[precision],
                **{"differs by": None, "within 1": None, "from": reference and ", ".join(reference)},
            }
            if reference:
                both, count = (folder, folders[reference]), args.batch * args.batches
                one, two = (np.stack([read_png(png_path(part, i)) for i in range(count)]).astype(int) for part in both)
                levels = np.abs(one - two)
                row.update({"differs by": float(levels.mean()), "within 1": float((levels <= 1).mean())})
            table.append(row)
            print(row, flush=True)
    tflops = {key: peak / 1e12 for key, peak in peaks.items()}
    record("sampling", table, **vars(args), cfg_scale=CFG_SCALE, forward_gflops=flops / 1e9, peak_tflops=tflops)


if __name__ == "__main__":
    main()
