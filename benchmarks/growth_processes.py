"""Stages of benchmarks/growth.py on several processes, joined by gloo: the real scripts on work of a fixed size.

Work of a fixed size takes the same time on any number of processes that share the cores. What grows with their number
is what every one of them does: imports, memory, and waiting for the others.
"""

import json

import numpy as np

from benchmarks.growth_networks import tiny_vae
from benchmarks.growth_stage import stage
from benchmarks.train_options import run
from dlc.data import FeatureWriter, Manifest

PROCESSES = (1, 2, 4, 8)
BATCH, STEPS, IMAGES = 64, 12, 64
CORES = "two cores share the work of all processes, and import all that each of them imports"


def scripts(folder, size):
    """Train and draw by so many processes, and write down how long it took: start-up, a step, drawing."""
    (folder / "features").mkdir()
    settings = dict(latents="sample", dtype="float16", image_size=128, images=256, classes=["a"])
    manifest = Manifest(L=16, V=256, scaling_factor=0.18215, **settings)
    writer, random = FeatureWriter(folder / "features", manifest), np.random.default_rng(0)
    writer.start()
    arrays = dict(
        features=random.standard_normal((256, 4, 16, 16), dtype=np.float32).astype(np.float16),
        sem=random.integers(0, 256, (256, 16), dtype=np.uint8),
        labels=np.zeros(256, np.int64),
        path=np.full(256, "a/0.png"),
    )
    writer.write(0, arrays, [])
    writer.finish(1)
    tiny_vae().save_pretrained(folder / "vae")

    def launch(*command):
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}")
        failed, peak = run(*launcher, *command, output=folder / "output.txt")
        assert not failed, failed
        return peak * 1024

    features, results, drawn = folder / "features", folder / "results", folder / "samples"
    began = (folder / "vae/config.json").stat().st_mtime
    training = launch(
        "train_diffusion.py", "--model", "DiTSEM-Ti/4", "--features-path", features, "--results-dir", results,
        "--global-batch-size", BATCH, "--max-steps", STEPS, "--log-every", STEPS // 2, "--num-workers", 1,
    )  # fmt: skip
    line = json.loads((results / "metrics.jsonl").read_text().splitlines()[-1])
    started = (results / "args.json").stat().st_mtime - began  # written when all processes have met
    sampling = launch(
        "sample_ddp_computed_dlc.py", "--model", "DiTSEM-Ti/4", "--results-dir", results, "--dlc-dir", features,
        "--vae", folder / "vae", "--sample-dir", drawn, "--num-fid-samples", IMAGES,
        "--per-proc-batch-size", IMAGES // size, "--num-sampling-steps", 50,
    )  # fmt: skip
    record = next(drawn.glob("*/samples.json")).stat().st_mtime
    last = max(path.stat().st_mtime for path in drawn.glob("*/*.png"))
    step = 1 / line["steps_per_second"]
    found = dict(started=(started, training), step=(step, training), drawn=(last - record, sampling))
    (folder / "measured.json").write_text(json.dumps(found))


def measured(folder, what):
    return tuple(json.loads((folder / "measured.json").read_text())[what])


@stage("start of training", "processes", PROCESSES, 1, scripts, CORES)
def starting(folder, size):
    return measured(folder, "started")


@stage(f"training step, global batch of {BATCH}", "processes", PROCESSES, 1, scripts, CORES)
def stepping(folder, size):
    return measured(folder, "step")


@stage(f"drawing {IMAGES} images, 50 steps", "processes", PROCESSES, 1, scripts, CORES)
def drawing(folder, size):
    return measured(folder, "drawn")
