"""Which machine is this: processes, device, threads, precision, logging."""
import contextlib
import datetime
import importlib.metadata
import logging
import os
import signal
import sys
import threading
import warnings

import torch

from dlc.cli import one_line, printable, warn_once
from dlc.signals import on_first_signal

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PATIENCE = datetime.timedelta(hours=12)  # of processes with one another: one may write a large file meanwhile
SAID_WAITING = 30                        # seconds after which a process says that it waits for the others to start


#################################################################################
#                       What accelerate's launcher asks for                     #
#################################################################################

# `accelerate launch` tells its configuration through these variables, and accelerate's classes act on them by themselves.
# What no flag of ours stands for is refused, lest it be passed over in silence or change what a flag says.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed: shard with FSDP (train_options/fsdp.yaml)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM: shard with FSDP (train_options/fsdp.yaml)",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's data parallelism: use --multi_gpu",
    "FSDP_OFFLOAD_PARAMS": "FSDP with parameters offloaded to the CPU: leave out fsdp_offload_params",
}
WANTED = {      # values, the first of which is also the launcher's default
    "FSDP_SHARDING_STRATEGY": (("full_shard", "1"), "all parameters are sharded: fsdp_sharding_strategy FULL_SHARD"),
    "FSDP_RESHARD_AFTER_FORWARD": (("true", "full_shard", "1"), "blocks are resharded: fsdp_reshard_after_forward true"),
    "FSDP_IGNORED_MODULES": (("none", ""), "all modules are sharded: leave out fsdp_ignored_modules"),
}


def environment(variable, default=""):
    """An environment variable in lower case; as accelerate does, what is not set and what is empty are one."""
    return (os.environ.get(variable) or default).lower()


def is_on(variable):
    return environment(variable) in ("1", "true", "yes", "on", "y", "t")


def refuse_launcher():
    """Raise ValueError for what accelerate's configuration asks for and this program does not have."""
    for variable, what in REFUSED.items():
        if is_on(variable) and (is_on("ACCELERATE_USE_FSDP") or not variable.startswith("FSDP_")):
            raise ValueError(f"accelerate's configuration ({variable}) asks for {what}")
    if is_on("ACCELERATE_USE_FSDP"):
        for variable, (values, what) in WANTED.items():
            if environment(variable, values[0]) not in values:
                raise ValueError(f"accelerate's configuration has {variable} {os.environ[variable]}, here {what}")
    if is_on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        for kind in ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP"):
            if environment(f"PARALLELISM_CONFIG_{kind}_SIZE", "1") not in ("1", "none"):
                raise ValueError(f"accelerate's configuration asks for PARALLELISM_CONFIG_{kind}_SIZE "
                                 f"{os.environ[f'PARALLELISM_CONFIG_{kind}_SIZE']}: use --multi_gpu, or FSDP "
                                 "(train_options/fsdp.yaml)")


def asked_to_compile(flag, on_gpu):
    """What --compile, else accelerate's dynamo backend, else the kind of device say: whether to compile the blocks.

    Raises ValueError where the backend alone decides and is none that is to be had.
    """
    if flag is not None:
        return flag
    backend, mode = environment("ACCELERATE_DYNAMO_BACKEND", "no"), environment("ACCELERATE_DYNAMO_MODE", "default")
    if backend not in ("no", "inductor") or backend == "inductor" and mode not in ("default", "none"):
        raise ValueError(f"accelerate's configuration asks for the dynamo backend {backend} in mode {mode}, wanted no, or "
                         "inductor in mode default; --compile and --no-compile go before it")
    return on_gpu or backend == "inductor"


def unused_launcher_settings(grad_accum, checkpoint_activations):
    """Lines on what accelerate's configuration says otherwise than our flags, which go before it."""
    lines, steps = [], environment("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", str(grad_accum)):
        lines.append(f"accelerate's {steps} gradient accumulation steps are not used: --grad-accum {grad_accum} is")
    if is_on("ACCELERATE_USE_FSDP") and is_on("FSDP_ACTIVATION_CHECKPOINTING") and not checkpoint_activations:
        lines.append("accelerate's fsdp_activation_checkpointing is not used: --checkpoint-activations asks for it here")
    return lines


#################################################################################
#                                   Processes                                   #
#################################################################################

def _interrupt(number):
    raise KeyboardInterrupt


@contextlib.contextmanager
def said_when_waiting():
    """Say at which address this process waits for the others, should that take long."""
    def say():
        if os.environ.get("LOCAL_RANK", "0") == "0":
            address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
            print(f"rank {os.environ.get('RANK', '0')} still waits for all {os.environ.get('WORLD_SIZE', '?')} processes "
                  f"to meet at {address}: was every one started, and does each reach that address?",
                  file=sys.stderr, flush=True)
    timer = threading.Timer(SAID_WAITING, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def start_processes():
    """Join the WORLD_SIZE processes of whatever launcher this is into one group: NCCL on GPUs, gloo on the CPU.

    Returns accelerate's PartialState: device, process_index, num_processes, is_main_process, wait_for_everyone().

    Ctrl-C, from here on, raises KeyboardInterrupt, and a second one ends the process.

    Raises ValueError where the group is not as large as the launcher says, and as refuse_launcher does.
    """
    from accelerate import PartialState             # here, as all that takes long: --help and mistaken flags need none of it
    refuse_launcher()
    on_first_signal([signal.SIGINT], _interrupt)
    on_cpu = is_on("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if on_cpu:
        # 1 is what launchers set where the user set nothing, and cannot be told from a user's own: take a fair share
        if os.environ.get("OMP_NUM_THREADS", "1") == "1":
            torch.set_num_threads(cores_per_process())
            os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    with said_when_waiting():
        state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != world_size:
        raise ValueError(f"WORLD_SIZE is {world_size} but this process is in a group of {state.num_processes}: "
                         "start the script with torchrun or accelerate launch")
    return state


def from_rank_0(value):
    """Rank 0's value of a picklable object, in every process: what it saw on a shared disk, say."""
    from accelerate.utils import broadcast_object_list
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
    from accelerate.utils import gather_object
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
    for handler in [logging.StreamHandler(sys.stdout)] + ([LogFile(log_file)] if log_file else []):
        handler.setFormatter(PrintableFormatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger


class PrintableFormatter(logging.Formatter):
    """Lines without what the names of files and classes could do to a terminal."""

    def format(self, record):
        return printable(super().format(record))


class LogFile(logging.FileHandler):
    """A log file whose disk may be full: that ends nothing, and is said once."""

    def handleError(self, record):
        warn_once("log file", f"cannot write {self.baseFilename} ({one_line(sys.exc_info()[1])})")


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
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
    on_cpu = PartialState().device.type == "cpu"
    # sharding is ours: accelerate does it on no CPU, and knows of no EMA
    sharded = is_on("ACCELERATE_USE_FSDP")
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        os.environ.pop(variable, None)
    if precision == "fp16" and on_cpu:
        logger.warning("warning: fp16 needs a GPU; this run uses float32")
        precision = "fp32"
    # torch 2.15 warns of this name; the one it wants instead does not exist in 2.6
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    accelerator = Accelerator(
        cpu=on_cpu, mixed_precision="no" if precision == "fp32" else precision, log_with=report_to, project_dir=run_dir,
        # both given, lest accelerate ask the environment: flags of ours say what to compile and accumulate
        dynamo_backend="no", gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)])
    if report_to:
        if not accelerator.log_with:
            raise ValueError(f"--report-to {report_to} needs its package: pip install {report_to}")
        accelerator.init_trackers("tensorboard" if report_to == "tensorboard" else "dlc-dit")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if sharded and precision == "fp16":
        raise ValueError("--mixed_precision fp16 does not go with FSDP: use bf16")
    return accelerator, precision, sharded


def in_batches(network, rows, size, places=None):
    """network(rows), of each row (n, ...), computed in batches of one size and each row at its own place in its batch.

    How a network rounds a row depends on the batch's size and, on some machines, on the row's place. So that it depends
    on nothing else, the places that no row has are filled with copies of another.

    Args:
        places: (n,) int64 on the CPU, ascending, out of an endless row of places that batches are cut from; None: from
            0 on, without a gap.
    """
    batches, outputs = {}, []
    for row, place in enumerate(range(len(rows)) if places is None else places.tolist()):
        batches.setdefault(place // size, {})[place % size] = row
    for own in batches.values():                        # place in the batch -> row
        first = next(iter(own.values()))
        # stacked, not indexed by a tensor: copied to the GPU, it would make the CPU wait
        output = network(torch.stack([rows[own.get(place, first)] for place in range(size)]))
        outputs += [output[place] for place in own]
    return torch.stack(outputs)
