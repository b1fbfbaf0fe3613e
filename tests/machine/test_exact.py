"""Work on several threads, whose results keep their order, and batches of one size."""

import threading

import torch

from dlc.machine.exact import in_batches, side_by_side


def test_work_is_side_by_side_and_its_results_in_order():
    second = threading.Event()  # which a single thread would never set

    def work(item):
        return item, second.set() if item else second.wait(30)

    assert [item for item, _ in side_by_side(work, range(2), torch.device("cpu"), threads=2)] == [0, 1]
    assert list(side_by_side(str, range(20), torch.device("cpu"))) == [str(item) for item in range(20)]


def test_batches_of_one_size():
    seen = []

    def network(batch):
        seen.append(batch[:, 0].tolist())
        return batch * 10

    rows = torch.arange(1, 7).unsqueeze(1).expand(-1, 2)
    assert torch.equal(in_batches(network, rows, 4), rows * 10)
    assert seen == [[1, 2, 3, 4], [5, 6, 5, 5]]
