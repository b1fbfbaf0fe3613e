"""What a GPU needs before the work: a driver that torch can use, one GPU for each process, and bfloat16 in hardware."""

import os
import socket
from collections.abc import Collection
from pathlib import Path

import torch

from dlc.machine.cli import one_line


def refuse_unusable_gpus() -> None:
    """Raise ValueError if this node has NVIDIA GPUs that torch cannot use: the CPU would take weeks, and say little.

    CUDA_VISIBLE_DEVICES that is empty, -1, or SLURM's NoDevFiles hides them on purpose.
    """
    asked, fault = os.environ.get("CUDA_VISIBLE_DEVICES"), ""
    if torch.cuda.is_available() or asked in ("", "-1", "NoDevFiles"):
        return
    if torch.version.cuda is None:
        if torch.version.hip is None and list(Path("/dev").glob("nvidia[0-9]*")):
            fault = (
                f"this node has NVIDIA GPUs, but torch {torch.__version__} is built without CUDA: install one with it"
            )
    elif count := torch.cuda.device_count():  # the driver's management library answers, whatever the driver's version
        fault = (
            f"this node has {count} GPUs, but torch {torch.__version__} for CUDA {torch.version.cuda} cannot use them"
        )
        try:
            torch.cuda.init()
        except RuntimeError as error:
            fault += f" ({one_line(error, 150)})"
        fault += ": update the NVIDIA driver, or install a torch for an older CUDA"
    elif asked:
        fault = f"CUDA_VISIBLE_DEVICES={asked} names no GPU of this node: correct it, or unset it"
    if fault:
        raise ValueError(f"{fault}; ACCELERATE_USE_CPU=1 takes the CPU")


def refuse_old_gpu(device: torch.device, precisions: Collection[str]) -> None:
    """Raise ValueError for bf16 on a GPU that only emulates it, slowly: compute capability below 8."""
    major, minor = torch.cuda.get_device_capability(device)
    if "bf16" in precisions and major < 8:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) has no bf16: take fp16"
        )


def identity(device: torch.device) -> tuple[str, str]:
    """Which GPU this is, among those of all nodes, whatever number it has in this process."""
    return socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)


def refuse_shared_gpus(gpus: list[tuple[str, str]]) -> None:
    """Raise ValueError if two processes have the same GPU. gpus: the `identity` of each process's."""
    for gpu in gpus:
        ranks = [rank for rank, other in enumerate(gpus) if other == gpu]
        if len(ranks) > 1:
            raise ValueError(
                f"ranks {', '.join(map(str, ranks))} have the same GPU of {gpu[0]}: start as many processes on a node "
                "as it has GPUs (--nproc_per_node, --num_processes)"
            )
