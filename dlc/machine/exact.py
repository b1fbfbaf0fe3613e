"""Results that depend on their own input alone: not on its neighbours in a batch, nor on the number of threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from dlc.machine.processes import cores_per_process, set_numerics


def set_exact_numerics() -> None:
    """For the whole process: one CPU thread per operation, no TF32, deterministic cuDNN.

    The sums in a convolution depend on how many threads share it. One thread per operation makes them reproducible,
    and batches side by side, a thread each, are faster than threads that share one batch.
    """
    torch.set_num_threads(1)
    set_numerics(tf32=False, deterministic=True)


def in_batches(network: Callable, rows: torch.Tensor, size: int) -> torch.Tensor:
    """network(rows) for rows (n, ...), computed in batches of one size: the last one is filled up with copies of a row.

    How a network rounds a row depends on the batch size and, on some machines, on the row's place in the batch. So a
    row's result depends on its number and the size, but neither on n nor on the other rows.
    """
    outputs = []
    for part in rows.split(size):
        free = size - len(part)
        filled = torch.cat([part, part[:1].expand(free, *part.shape[1:])]) if free else part
        outputs.append(network(filled)[: len(part)])
    return torch.cat(outputs)


def side_by_side(function: Callable, items: Iterable, device: torch.device, threads: int | None = None) -> Iterator:
    """function(item) of each item, in order, computed by `threads` threads, which run as many items ahead.

    Args:
        threads: how many [one per core, or two on a GPU, so that it always has work queued].
    """
    on_gpu = device.type == "cuda"  # where new threads default to cuda:0
    threads = threads or (2 if on_gpu else cores_per_process())
    futures, use = deque(), dict(initializer=torch.cuda.set_device, initargs=(device,)) if on_gpu else {}
    with ThreadPoolExecutor(threads, **use) as pool:
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) > threads:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
