"""Which machine is this: processes, device, threads, precision, logging."""
import datetime
import importlib.metadata
import logging
import os
import sys
import warnings

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


PATIENCE = datetime.timedelta(hours=12)  # of processes with one another: one may write a large file meanwhile


def start_processes():
    """Join the WORLD_SIZE processes of whatever launcher this is into one group: NCCL on GPUs, gloo on the CPU.

    Returns accelerate's PartialState: device, process_index, num_processes, is_main_process, wait_for_everyone().

    Raises ValueError where the group is not as large as the launcher says.
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        # 1 is what launchers set where the user set nothing, and cannot be told from a user's own: take a fair share
        if os.environ.get("OMP_NUM_THREADS", "1") == "1":
            torch.set_num_threads(cores_per_process())
            os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != world_size:
        raise ValueError(f"WORLD_SIZE is {world_size} but this process is in a group of {state.num_processes}: "
                         "start the script with torchrun or accelerate launch")
    return state


def from_rank_0(value):
    """Rank 0's value of a picklable object, in every process: what it saw on a shared disk, say."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def done_by_rank_0(state, work):
    """work() in rank 0, its value in every process; the ValueError or OSError it raises, too, as a ValueError."""
    value, error = None, None
    if state.is_main_process:
        try:
            value = work()
        except (ValueError, OSError) as raised:
            error = str(raised)
    value, error = from_rank_0((value, error))
    if error:
        raise ValueError(error)
    return value


def agree(what, value):
    """Raise ValueError in every process where one does not see rank 0's value, on another disk, say."""
    if any(gather_object([from_rank_0(value) != value])):
        raise ValueError(f"the processes do not see the same {what}: is every path on a disk that all of them share?")


def cores_per_process():
    """This process's share of the cores, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def default_num_workers():
    """Data loader processes for this process: its share of the cores, at most 8."""
    return min(8, cores_per_process())


def autocast(device, precision):
    """The autocast context of "fp32", "bf16" or "fp16" on a device; fp32 is no autocast."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def versions():
    """The versions of what decides numbers, by package."""
    return {name: importlib.metadata.version(name)
            for name in ("torch", "torchvision", "accelerate", "diffusers", "timm", "numpy", "Pillow")}


def create_logger(state, log_file=None):
    """A logger to standard output and, where given, appended to log_file; silent on all ranks but 0."""
    logger = logging.getLogger("dlc")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = []
    if not state.is_main_process:
        logger.addHandler(logging.NullHandler())
        return logger
    for handler in [logging.StreamHandler(sys.stdout)] + ([logging.FileHandler(log_file)] if log_file else []):
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger


def asked_precision(precision=None):
    """What --precision and the launcher's --mixed_precision ask for between them: "fp32", "bf16" or "fp16".

    Args:
        precision: one of these, or "amp": 16 bits, the launcher's or else bf16; None leaves it to the launcher, whose
            "no" is also what launchers say where the user said nothing.

    Raises ValueError where they contradict each other.
    """
    launchers = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launchers not in ("no", "fp16", "bf16"):
        raise ValueError(f"the launcher's --mixed_precision {launchers}: this trains in fp16, bf16 or, by no, in fp32")
    if precision == "amp":
        return "bf16" if launchers == "no" else launchers
    if precision and launchers not in ("no", precision):
        raise ValueError(f"the launcher's --mixed_precision {launchers} contradicts --precision {precision}, which the "
                         "files of train_options/ set, too: launch with --mixed_precision no, or leave the flag out")
    return precision or ("fp32" if launchers == "no" else launchers)


def create_accelerator(logger, precision, tf32=True, report_to=None, run_dir=None):
    """accelerate's Accelerator for the processes of `start_processes`, and what its configuration asks for.

    Returns the Accelerator, the precision (fp16 without a GPU becomes fp32, and that is said once), and whether to
    shard, as an FSDP configuration asks.

    Args:
        precision: as `asked_precision` gives it.
        tf32: whether float32 products and convolutions on GPUs may round their factors to TF32.
        report_to: "tensorboard" or "wandb", where `accelerator.log` writes; for tensorboard into run_dir.

    Raises ValueError where that package is not there, and for fp16 with sharding.
    """
    on_cpu = not torch.cuda.is_available()
    # sharding is ours: accelerate does it on no CPU, and knows of no EMA
    sharded = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if precision == "fp16" and on_cpu:
        logger.warning("warning: fp16 needs a GPU; this run uses float32")
        precision = "fp32"
    # torch 2.15 warns of this name; the one it wants instead does not exist in 2.6
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    accelerator = Accelerator(
        cpu=on_cpu, mixed_precision="no" if precision == "fp32" else precision, log_with=report_to, project_dir=run_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)])
    if report_to:
        if not accelerator.log_with:
            raise ValueError(f"--report-to {report_to} needs its package: pip install {report_to}")
        accelerator.init_trackers("tensorboard" if report_to == "tensorboard" else "dlc-dit")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if sharded and precision == "fp16":
        raise ValueError("--mixed_precision fp16 does not go with FSDP: use bf16")
    return accelerator, precision, sharded
