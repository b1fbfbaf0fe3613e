"""What GPUs need: those that torch cannot use, or that two processes share, end a program before its work; one graph a
block inside DDP; the sharded EMA. torch.cuda is made up here."""

import datetime
import os
from copy import deepcopy
from types import SimpleNamespace
from unittest.mock import Mock

import accelerate
import pytest
import torch
import torch._functorch.config
from conftest import refusal, tiny_vae
from drawing import draw, tiny_model

from dlc.machine import processes
from dlc.machine.gpus import refuse_shared_gpus
from dlc.machine.processes import compile_blocks, on_gpus, start_processes
from dlc.nets.pixels import PixelEncoder
from dlc.sampling import command, prior_draw
from dlc.training.run import Run
from dlc.training.sharding import fully_shard_blocks, local_shards
from models import DiTSEM


@pytest.fixture
def cuda(monkeypatch):
    """cuda(available=…, count=…, …): what torch.cuda says."""
    for variable in ("ACCELERATE_USE_CPU", "WORLD_SIZE", "RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)

    def say(available=True, count=1, capability=(9, 0), version="13.0"):
        monkeypatch.setattr(torch.version, "cuda", version)
        for name, value in dict(
            is_available=available,
            device_count=count,
            get_device_capability=capability,
            get_device_name="Tesla T4",
            get_device_properties=SimpleNamespace(uuid="u"),
        ).items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)

    return say


@pytest.fixture
def joined(monkeypatch):
    """joined(device, …): the group of processes that accelerate joins is one of this device."""

    def join(device, **state):
        state = SimpleNamespace(device=torch.device(device), num_processes=1, **state)
        monkeypatch.setattr("accelerate.PartialState", lambda **_: state)

    return join


TOO_OLD, NONE = dict(available=False, count=8), dict(available=False, count=0)
VISIBLE, USE_CPU = "CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU"


@pytest.mark.parametrize(
    "says, environment, words",
    [
        (TOO_OLD, {}, r"8 GPUs, but torch .* for CUDA 13.0 .*driver.*older CUDA.*ACCELERATE_USE_CPU=1"),
        (TOO_OLD, {USE_CPU: "1"}, None),
        (NONE, {}, None),
        (NONE, {VISIBLE: "7"}, "CUDA_VISIBLE_DEVICES=7 names no GPU of this node: .*_USE_CPU=1"),
        (NONE, {VISIBLE: ""}, None),  # hides them on purpose
        (NONE, {VISIBLE: "-1"}, None),
        (dict(NONE, version=None), {}, r"this node has NVIDIA GPUs, but torch .* is built without CUDA"),
        (dict(NONE, version=None), {VISIBLE: ""}, None),
        ({}, {USE_CPU: "true"}, None),
    ],
)
def test_gpus_that_are_not_used(says, environment, words, cuda, monkeypatch):
    cuda(**says)
    assert on_gpus() == (not says)
    monkeypatch.setattr("pathlib.Path.glob", lambda folder, pattern: iter([folder / "nvidia0"]))
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    if words:
        refusal(start_processes, words=words)
    else:
        assert start_processes().device.type == "cpu" and not on_gpus()


def test_processes_of_a_node_share_its_cores(cuda, joined, monkeypatch, capsys):
    """Compilers beside a GPU; and more processes than cores, as `accelerate launch` starts by a config of another."""
    cuda()
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "")
    del os.environ["TORCHINDUCTOR_COMPILE_THREADS"]
    monkeypatch.setattr(processes, "cores", lambda: 24)
    monkeypatch.setattr("dlc.machine.cli.WARNED", set())
    joined("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    start_processes()
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "3" and not capsys.readouterr().err
    cuda(**NONE)
    joined("cpu")
    monkeypatch.setattr(processes, "cores", lambda: 2)
    start_processes()
    assert capsys.readouterr().err == "warning: 8 processes share 2 cores: start fewer (--num_processes)\n"


def test_one_visible_gpu_per_process(cuda, joined):
    """accelerate gives DDP and barriers local_process_index as the GPU's number: LOCAL_RANK is not it here."""
    cuda(capability=(7, 5))
    joined("cuda", local_process_index=3)
    state = start_processes(precisions=["fp16"])
    assert state.local_process_index == 0 and state.device == torch.device("cuda:0")
    words = r"Tesla T4 \(compute capability 7.5\) has no bf16: take fp16"
    refusal(start_processes, precisions=["fp32", "bf16"], words=words)  # which it emulates


def test_processes_that_share_a_gpu():
    refuse_shared_gpus([("a", "0"), ("a", "1"), ("b", "0")])
    shared, words = [("a", "0"), ("a", "1"), ("a", "0")], "ranks 0, 2 have the same GPU of a: start as many processes"
    refusal(refuse_shared_gpus, shared, words=words)


RTX = """Using RTX 4000 series doesn't support faster communication broadband via P2P or IB. Please set
`NCCL_P2P_DISABLE="1"` and `NCCL_IB_DISABLE="1" or use `accelerate launch` which will do this automatically."""
REFUSED = "Gloo connectFullMesh failed with [...] Connection refused, remote=[127.0.1.1]:5"


@pytest.mark.parametrize(
    "error, words",
    [
        (NotImplementedError(RTX), 'NCCL_P2P_DISABLE="1"` and `NCCL_IB_DISABLE="1"'),
        # gloo takes the address to which the host's name resolves
        (RuntimeError(REFUSED), r"Connection refused.*GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"),
    ],
)
def test_what_helps_is_said_where_processes_cannot_be_joined(error, words, monkeypatch):
    monkeypatch.setattr("accelerate.PartialState", Mock(side_effect=error))
    refusal(start_processes, words=words)


def test_gpus_are_not_waited_for_as_long_as_files(cuda, joined, monkeypatch):
    cuda()
    joined("cuda")
    joining = Mock(side_effect=accelerate.PartialState)
    monkeypatch.setattr("accelerate.PartialState", joining)
    start_processes()
    assert joining.call_args.kwargs == dict(cpu=False, timeout=datetime.timedelta(hours=1))
    group = dict(is_initialized=lambda: True, get_backend=lambda: "nccl", new_group=lambda backend, timeout: timeout)
    for name, answer in group.items():
        monkeypatch.setattr(torch.distributed, name, answer)
    assert processes.files_group.__wrapped__() == datetime.timedelta(hours=12)


def test_blocks_on_a_gpu_keep_fewer_activations(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", Mock())
    with torch._functorch.config.patch(activation_memory_budget=1.0):
        compile_blocks(tiny_model(), torch.device("cpu"), options={"deterministic": True})
        assert torch.nn.Module.compile.call_args.kwargs["options"]["deterministic"]
        assert torch._functorch.config.activation_memory_budget == 1
        compile_blocks(tiny_model(), torch.device("cuda"))
        assert torch._functorch.config.activation_memory_budget == processes.ACTIVATION_BUDGET


@pytest.fixture
def group(tmp_path):
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


SMALL = dict(L=3, V=4, input_size=8, hidden_size=32, depth=2, num_heads=2)
INPUTS = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.zeros(2, 3, dtype=torch.int64)


def test_block_is_one_graph_inside_ddp(group):
    """DDP would have each block cut at its buckets of gradients: three graphs for a block of DiT-XL."""
    model, counters = DiTSEM(**SMALL), torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(model, torch.device("cpu"), backend="aot_eager")
    torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.001)(*INPUTS).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.skipif(not hasattr(torch.cpu.current_stream(), "record_event"), reason="no FSDP on the CPU")
def test_sharded_average_is_the_one_of_now(group):
    """A preview draws in inference mode, a measurement does not; neither leaves gathered weights to the next one."""
    run, whole = Run.__new__(Run), DiTSEM(**SMALL).requires_grad_(False).eval()
    for weight in whole.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    run.module = run.ema = deepcopy(whole)
    run.state = SimpleNamespace(is_main_process=True)
    fully_shard_blocks(run.ema, torch.device("cpu"))
    weights = list(run.ema.parameters())
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with run.whole_ema() as ema, mode():
            torch.testing.assert_close(ema(*INPUTS), whole(*INPUTS))
        for part in (local_shards(weights), whole.parameters()):
            torch._foreach_mul_(list(part), 0.5)


def test_kernels_are_chosen_without_timing_them(monkeypatch, tmp_path):
    """A kernel that is chosen by its time may sum in another order on another day: the bytes would differ."""
    has, cpu, options = hasattr(torch._inductor.config, "deterministic"), torch.device("cpu"), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **given: options.append(given["options"]))
    PixelEncoder(tiny_vae(), None, cpu, compile=True)
    for module in (command, prior_draw):
        monkeypatch.setattr(module, "compile_blocks", lambda model, on, **given: options.append(given["options"]))
    draw(tmp_path, tiny_model(), tiny_vae(), compile=True)
    prior = prior_draw.PriorDraw.__new__(prior_draw.PriorDraw)
    prior.tf32, prior.guide, prior.model = True, None, tiny_model()
    prior.to(cpu, compiled=True)
    assert options == [{"deterministic": True} if has else None] * 3
