"""What GPUs need: those that torch cannot use, or that two processes share, end a program before its work; one graph a
block inside DDP. torch.cuda is made up here."""

import os
from types import SimpleNamespace

import pytest
import torch
from conftest import refusal, tiny_vae

from dlc.machine import processes
from dlc.machine.gpus import refuse_shared_gpus
from dlc.machine.processes import compile_blocks, on_gpus, start_processes
from dlc.nets.pixels import PixelEncoder
from models import DiTSEM


@pytest.fixture
def cuda(monkeypatch):
    """cuda(available=…, count=…, …): what torch.cuda says."""
    for variable in ("ACCELERATE_USE_CPU", "WORLD_SIZE", "RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)

    def say(available=True, count=1, capability=(9, 0)):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"u{device.index}")
        )

    return say


@pytest.fixture
def joined(monkeypatch):
    """joined(device, …): the group of processes that accelerate joins is one of this device."""

    def join(device, **state):
        state = SimpleNamespace(device=torch.device(device), num_processes=1, **state)
        monkeypatch.setattr("accelerate.PartialState", lambda **_: state)

    return join


def test_driver_that_is_too_old(cuda, monkeypatch):
    cuda(available=False, count=8)
    refusal(start_processes, words=r"8 GPUs, but torch .* for CUDA 13.0 .*driver.*older CUDA.*ACCELERATE_USE_CPU=1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert start_processes().device.type == "cpu"
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    cuda(available=False, count=0)
    assert start_processes().device.type == "cpu"


@pytest.mark.parametrize("asked, refused", [("7", True), ("abc", True), ("", False), ("-1", False), (None, False)])
def test_gpus_that_are_not_there(asked, refused, cuda, monkeypatch):
    """CUDA_VISIBLE_DEVICES that names no GPU is a mistake; empty or -1 it hides them on purpose."""
    cuda(available=False, count=0)
    if asked is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked)
    if refused:
        refusal(start_processes, words=f"CUDA_VISIBLE_DEVICES={asked} names no GPU of this node: .*_USE_CPU=1")
    else:
        assert start_processes().device.type == "cpu"


def test_torch_without_cuda_on_a_node_with_gpus(cuda, monkeypatch):
    cuda(available=False, count=0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr("pathlib.Path.glob", lambda folder, pattern: iter([folder / "nvidia0"]))
    refusal(start_processes, words=r"this node has NVIDIA GPUs, but torch .* is built without CUDA")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert start_processes().device.type == "cpu"


def test_cpu_by_choice_on_a_node_with_gpus(cuda, monkeypatch):
    """What looks at the machine for a default looks at the choice, too."""
    cuda()
    assert on_gpus()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert not on_gpus() and start_processes().device.type == "cpu"


def test_compilers_of_a_node_share_its_cores(cuda, joined, monkeypatch):
    cuda()
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "")
    del os.environ["TORCHINDUCTOR_COMPILE_THREADS"]
    monkeypatch.setattr(processes, "cores", lambda: 24)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    joined("cuda")
    start_processes()
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "3"


def test_more_processes_than_cores(joined, monkeypatch, capsys):
    """As `accelerate launch` starts them by a config of eight GPUs on a small machine."""
    monkeypatch.setattr("dlc.machine.cli.WARNED", set())
    monkeypatch.setattr(processes, "cores", lambda: 2)
    joined("cpu")
    for count, words in ((2, ""), (8, "warning: 8 processes share 2 cores: start fewer (--num_processes)\n")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))
        start_processes()
        assert capsys.readouterr().err == words


def test_one_visible_gpu_per_process(cuda, joined):
    """accelerate gives DDP and barriers local_process_index as the GPU's number: LOCAL_RANK is not it here."""
    cuda()
    joined("cuda:0", local_process_index=3)
    assert start_processes().local_process_index == 0


def test_bf16_where_it_is_emulated(cuda, joined):
    cuda(capability=(7, 5))
    joined("cuda")
    with pytest.raises(ValueError, match=r"Tesla T4 \(compute capability 7.5\) has no bf16: take fp16"):
        start_processes(precisions=["fp32", "bf16"])
    assert start_processes(precisions=["fp16"]).device == torch.device("cuda:0")


def test_processes_that_share_a_gpu():
    refuse_shared_gpus([("a", "0"), ("a", "1"), ("b", "0")])
    with pytest.raises(ValueError, match="ranks 0, 2 have the same GPU of a: start as many processes on a node"):
        refuse_shared_gpus([("a", "0"), ("a", "1"), ("a", "0")])


def test_network_that_does_not_connect_the_nodes(monkeypatch):
    """The variables that help are named where gloo fails: it takes the address to which the host's name resolves."""

    def fail():
        raise RuntimeError("Gloo connectFullMesh failed with [...] Connection refused, remote=[127.0.1.1]:5")

    monkeypatch.setattr(processes, "files_group", fail)
    refusal(start_processes, words=r"Connection refused.*GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME")


def test_block_is_one_graph_inside_ddp(tmp_path):
    """DDP would have each block cut at its buckets of gradients: three graphs for a block of DiT-XL."""
    model, counters = DiTSEM(L=3, V=4, input_size=8, hidden_size=32, depth=2, num_heads=2), torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        compile_blocks(model, torch.device("cpu"), backend="aot_eager")
        wrapped = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.001)
        wrapped(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randint(0, 4, (2, 3))).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_extraction_compiles_without_timing_kernels(monkeypatch):
    """A kernel that is chosen by its time may sum in another order on another day: the bytes would differ."""
    options = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **given: options.append(given["options"]))
    PixelEncoder(tiny_vae(), None, torch.device("cpu"), compile=True)
    assert options == [{"deterministic": True} if hasattr(torch._inductor.config, "deterministic") else None]
