"""Processes, their device, threads and precision, what the launcher asks for, and the log.

accelerate gives DDP, the fp16 scaler, the trackers (TensorBoard, wandb) and the launcher that the README's commands
use. Sharding, checkpoints and data are ours: accelerate shards on no CPU and knows no EMA, and its checkpoints and data
loaders have no place for a resume that is exact to the bit.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dlc.machine.cli import drop_at_exit, one_line, printable, say, warn_once
from dlc.machine.gpus import identity, refuse_old_gpu, refuse_shared_gpus, refuse_unusable_gpus
from dlc.machine.signals import on_first_signal

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WAIT_FOR_GPUS = datetime.timedelta(hours=1)  # a link that is dead holds all of them that long
WAIT_FOR_FILES = datetime.timedelta(hours=12)  # rank 0 may be fetching or writing large ones
# Share of a compiled block's activations that is kept; the backward pass computes the rest again, without any matrix
# product: 0.8 takes 37% less memory per image and 2% more elementwise traffic (benchmarks/memory.py).
ACTIVATION_BUDGET = 0.8
SAID_WAITING = 30  # seconds after which a process prints that it waits for the others to start


#################################################################################
#                                 The launcher                                  #
#################################################################################

# `accelerate launch` passes its configuration through environment variables, on which accelerate's classes act by
# themselves. Settings that would make training differ from our flags are refused.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed: shard with FSDP (train_options/fsdp.yaml)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM: shard with FSDP (train_options/fsdp.yaml)",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "other parallelism: use --multi_gpu, or FSDP (train_options/fsdp.yaml)",
    "FSDP_OFFLOAD_PARAMS": "FSDP with parameters offloaded to the CPU: leave out fsdp_offload_params",
}


def environment(variable: str, default: str = "") -> str:
    """An environment variable in lower case. Unset and empty are the same, as for accelerate."""
    return (os.environ.get(variable) or default).lower()


def is_on(variable: str) -> bool:
    return environment(variable) in ("1", "true", "yes", "on", "y", "t")


def on_gpus() -> bool:
    """Whether the work goes to GPUs: torch can use one, and ACCELERATE_USE_CPU does not say otherwise."""
    return torch.cuda.is_available() and not is_on("ACCELERATE_USE_CPU")


def refuse_launcher(grad_accum: int | None = None) -> None:
    """Raise ValueError if the launcher's variables ask for what this program does not have, or contradict a flag."""
    for variable, what in REFUSED.items():
        if is_on(variable):
            raise ValueError(f"accelerate's configuration ({variable}) asks for {what}")
    steps = environment("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if grad_accum and steps not in ("1", str(grad_accum)):
        raise ValueError(
            f"accelerate's configuration asks for {steps} gradient accumulation steps, --grad-accum for {grad_accum}: "
            "set it by --grad-accum alone"
        )


def asked_to_compile(flag: bool | None, on_gpu: bool) -> bool:
    """Whether to compile the blocks: --compile decides, else accelerate's dynamo backend, else the kind of device.

    Raises ValueError if the backend decides and is not supported.
    """
    if flag is not None:
        return flag
    backend = environment("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend not in ("no", "inductor"):
        raise ValueError(
            f"accelerate's configuration asks for the dynamo backend {backend}, wanted no or inductor; --compile and "
            "--no-compile override it"
        )
    return on_gpu or backend == "inductor"


def asked_precision(precision: str | None = None) -> str:
    """What --precision and the launcher's --mixed_precision together ask for: "fp32", "bf16" or "fp16".

    Args:
        precision: one of these; or "amp": the launcher's 16 bits, else bf16; or None: the launcher decides. Its "no" is
            also its default, so it contradicts nothing.

    Raises ValueError if they contradict each other.
    """
    launchers = environment("ACCELERATE_MIXED_PRECISION", "no")
    if launchers not in ("no", "fp16", "bf16"):
        raise ValueError(
            f"the launcher's --mixed_precision {launchers}: this trains in fp16, bf16 or, with no, in fp32"
        )
    if precision == "amp":
        return "bf16" if launchers == "no" else launchers
    if precision and launchers not in ("no", precision):
        raise ValueError(
            f"the launcher's --mixed_precision {launchers} contradicts --precision {precision}, which the files of "
            "train_options/ set, too: launch with --mixed_precision no, or leave the flag out"
        )
    return precision or ("fp32" if launchers == "no" else launchers)


#################################################################################
#                                   Processes                                   #
#################################################################################


def _say_waiting():
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once per node
        rank, size, address, port = (
            os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        )
        say(
            f"rank {rank} still waits for all {size} processes to meet at {address}:{port}: was every one started, and "
            "does each reach that address?"
        )


def start_processes(grad_accum: int | None = None, precisions: Collection[str] = ()) -> "PartialState":
    """Join the WORLD_SIZE processes of any launcher into one process group: NCCL on GPUs, gloo on the CPU.

    Returns accelerate's PartialState: device, process_index, num_processes, is_main_process.

    From here on, Ctrl-C raises KeyboardInterrupt, and a second Ctrl-C ends the process.

    Raises ValueError if the group is smaller than the launcher says; if GPUs are here that torch cannot use, that two
    processes share, or that lack one of the precisions; and as refuse_launcher does.
    """
    from accelerate import PartialState  # imported late: --help and mistaken flags do not need it

    refuse_launcher(grad_accum)
    on_first_signal([signal.SIGINT], lambda number: signal.default_int_handler(number, None))
    on_cpu = not on_gpus()
    if not is_on("ACCELERATE_USE_CPU"):
        refuse_unusable_gpus()
    # torch would start up to 32 compilers in each process of a node
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(32, cores_per_process())))
    if on_cpu:
        # launchers set 1 if the user set nothing, which looks like a user's own 1: take a fair share of the cores
        if os.environ.get("OMP_NUM_THREADS", "1") == "1":
            torch.set_num_threads(cores_per_process())
            os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        if local_processes() > cores():
            warn_once("cores", f"{local_processes()} processes share {cores()} cores: start fewer (--num_processes)")
    waiting = threading.Timer(SAID_WAITING, _say_waiting)
    waiting.daemon = True
    waiting.start()
    try:
        state = PartialState(cpu=on_cpu, timeout=WAIT_FOR_FILES if on_cpu else WAIT_FOR_GPUS)
        files_group()
        world_size = int(os.environ.get("WORLD_SIZE", 1))
    except (ValueError, RuntimeError, ImportError) as error:
        network = "; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network interface that reaches the other nodes"
        raise ValueError(
            "cannot start the process group from WORLD_SIZE, RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and "
            f"ACCELERATE_…: {one_line(error, 250)}{network if 'gloo' in str(error).lower() else ''}"
        ) from None
    finally:
        waiting.cancel()
    if state.num_processes != world_size:
        raise ValueError(
            f"WORLD_SIZE is {world_size} but this process is in a group of {state.num_processes}: "
            "start the script with torchrun or accelerate launch"
        )
    if state.device.type == "cuda":
        state.device = torch.device("cuda", state.device.index or 0)  # threads need its number
        # accelerate passes this on as the GPU's number, which it is not where each process sees one GPU alone
        state.local_process_index = state.device.index
        refuse_old_gpu(state.device, precisions)
        refuse_shared_gpus(from_all(identity(state.device)))
    return state


@functools.cache
def files_group() -> dist.ProcessGroup | None:
    """The group in which processes tell each other what they did and read, on the CPU and with a long time limit.

    None for a single process. All processes call this first at the same place, once they are joined.
    """
    if not dist.is_initialized():
        return None
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=WAIT_FOR_FILES)


def from_all(value: Any) -> list:
    """A picklable object of each process, in the order of ranks."""
    if files_group() is None:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=files_group())
    return values


def from_rank_0(value: Any) -> Any:
    """Rank 0's value of a picklable object, in every process: what it saw on a shared disk, for example."""
    values = [value]
    if files_group() is not None:
        dist.broadcast_object_list(values, group=files_group())
    return values[0]


def wait_for_all() -> None:
    """Wait until every process is here, for hours if need be: rank 0 may be writing a large file."""
    if files_group() is not None:
        dist.barrier(group=files_group())


def done_by_rank_0(state: "PartialState", work: Callable[[], Any]) -> Any:
    """Call work() in rank 0; give its value, or raise its ValueError or OSError as a ValueError, in every process."""
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


def agree(what: str, value: Any) -> None:
    """Raise ValueError in every process if one of them has another value than rank 0, such as from another disk."""
    if any(from_all(from_rank_0(value) != value)):
        raise ValueError(f"the processes do not see the same {what}: is every path on a disk that all of them share?")


def local_processes() -> int:
    """How many processes the launcher started on this machine."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(processes) if processes.isdecimal() else 1)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cores_per_process() -> int:
    """This process's share of the cores, at least 1."""
    return max(1, cores() // local_processes())


def default_num_workers() -> int:
    """How many data readers this process starts; none on a Mac, whose libraries may end a process that was forked."""
    return 0 if sys.platform == "darwin" else min(8, cores_per_process())


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of "fp32" (none), "bf16" or "fp16" on a device."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def compile_blocks(model: torch.nn.Module, device: torch.device, **kwargs) -> None:
    """torch.compile the blocks of a transformer for a device, when they are first called. kwargs: as torch.compile's.

    On a GPU, what a block keeps for its backward pass is held to ACTIVATION_BUDGET. On a CPU, exp computes GELU's tanh,
    with an absolute error of float32's rounding, and a block takes 6% less time (measured: benchmarks/README.md).
    """
    import torch._functorch.config as partitioner
    from torch._inductor import config

    torch._dynamo.config.optimize_ddp = False  # would cut a block into three graphs, at each 25 MB of its weights
    if device.type == "cuda":
        partitioner.activation_memory_budget = ACTIVATION_BUDGET
    elif hasattr(config.cpp, "use_decompose_tanh") and "backend" not in kwargs:
        kwargs["options"] = {**(kwargs.get("options") or {}), "cpp.use_decompose_tanh": True}
    for block in model.blocks:
        block.compile(**kwargs)


def same_kernels() -> dict[str, bool] | None:
    """torch.compile's options for choosing kernels without timing them, since another choice rounds otherwise: the
    choice could differ after an interruption. None where torch has no such option."""
    from torch._inductor import config

    return {"deterministic": True} if hasattr(config, "deterministic") else None


def add_speed_flags(add: Callable) -> None:
    """The flags --tf32 and --compile; `add` is the add_argument of a parser or a group."""
    add(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use TF32 for float32 products on GPUs [%(default)s]",
    )
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the blocks [on GPUs]")


def set_numerics(tf32: bool, deterministic: bool = False) -> None:
    """Set how GPUs compute, for the whole process.

    Args:
        tf32: whether matrix products and convolutions of float32 may round their factors to TF32.
        deterministic: whether cuDNN may choose only algorithms that give the same bits at every call.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.deterministic = deterministic


def versions() -> dict[str, str]:
    """The versions of the packages that decide numbers, of those that are installed."""
    found = {}
    for name in ("torch", "torchvision", "accelerate", "diffusers", "timm", "numpy", "Pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def create_logger(state: "PartialState", log_file: Path | None = None) -> logging.Logger:
    """A logger to standard output and, if given, to the end of log_file; silent on all ranks but 0."""
    logger = logging.getLogger("dlc")
    logger.setLevel(logging.INFO)
    logger.propagate, logger.handlers = False, [logging.NullHandler()]
    if state.is_main_process:
        logger.handlers = [logging.StreamHandler(sys.stdout), *([logging.FileHandler(log_file)] if log_file else [])]
    for handler in logger.handlers:
        handler.handleError = functools.partial(_not_written, handler)
        handler.setFormatter(PrintableFormatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
    return logger


class PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _not_written(handler, record):
    """A log may be on a full disk, or its reader gone: one warning, and the work goes on."""
    where = getattr(handler, "baseFilename", "standard output")
    drop_at_exit(handler.stream)
    warn_once(f"log {where}", f"cannot write {where} ({one_line(sys.exc_info()[1])})")


def create_accelerator(
    logger: logging.Logger, precision: str, report_to: str | None, run_dir: Path, first_step: int
) -> tuple["Accelerator", str, bool]:
    """accelerate's Accelerator for the processes of `start_processes`, and what its configuration asks for.

    Returns the Accelerator; the precision, which is fp32 instead of fp16 if there is no GPU (logged once); and whether
    to shard, as an FSDP configuration asks.

    Args:
        precision: as `asked_precision` gives it.
        report_to: "tensorboard" or "wandb", where `accelerator.log` writes; TensorBoard's files go into run_dir, and
            hide what an earlier launch wrote there after first_step.

    Raises ValueError if that package is not installed or does not start, and for fp16 with sharding.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    on_cpu = PartialState().device.type == "cpu"
    sharded = is_on("ACCELERATE_USE_FSDP")
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # no argument keeps Accelerator from sharding in its own way
    if precision == "fp16" and on_cpu:
        logger.warning("warning: fp16 needs a GPU; this run uses float32")
        precision = "fp32"
    if report_to and not importlib.util.find_spec(report_to):
        raise ValueError(f"--report-to {report_to} needs its package: pip install {report_to}")
    # torch 2.15 warns about this name, whose replacement does not exist in 2.6
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=report_to,
        project_dir=run_dir,
        # both given, so that accelerate does not ask the environment: our flags decide on compiling and accumulation
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if report_to:
        fault, purge = None, dict(tensorboard=dict(purge_step=first_step + 1))
        try:
            accelerator.init_trackers("tensorboard" if report_to == "tensorboard" else "dlc-dit", init_kwargs=purge)
        except Exception as error:  # no key, no network, a package that is too old
            fault = one_line(error, 200)
        if fault := from_rank_0(fault):
            offline = "; run wandb login, or set WANDB_MODE=offline" if report_to == "wandb" else ""
            raise ValueError(f"--report-to {report_to} does not start ({fault}){offline}")
    if sharded and precision == "fp16":
        raise ValueError("--mixed_precision fp16 does not go with FSDP: use bf16")
    return accelerator, precision, sharded
