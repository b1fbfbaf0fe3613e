"""CUDA without a card: torch's FakeTensorMode, in which tensors say "cuda" and have shapes but no values.

    with fake_cuda(monkeypatch):
        model = real(DiT_models["DiT-S/2"]).to(CUDA)
        with no_waiting():
            model(x, t, y)

What mixes devices raises torch's own error, and so does whatever needs a value: .item(), .tolist(), bool(), nonzero. In
`no_waiting`, what makes the CPU wait for the GPU in another way raises `Waits`: copies between them.
"""

import contextlib

import torch
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
NOWHERE = library.Library("aten", "IMPL", "Meta")  # torch has this operator for values alone
for overload in ("_fused_sgd_", "_fused_sgd_.tensor_lr"):
    NOWHERE.impl(overload, lambda *inputs, **options: None)


class Waits(AssertionError):
    """An operation makes the CPU wait for the GPU."""


class Waiting(TorchDispatchMode):
    """Counts down how often the CPU waits for the GPU: see `no_waiting`."""

    def __init__(self, reads, copies):
        super().__init__()
        self.reads, self.copies = reads, copies

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "aten":  # of which some come in one piece in inference mode, such as .to()
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        if func is torch.ops.aten._local_scalar_dense.default and "cuda" in devices:
            if not self.reads:
                raise Waits("the CPU reads a number from the GPU")
            return self.reads.pop(0)
        out = func(*args, **kwargs)
        made = {leaf.device.type for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)}
        # copies by non_blocking do not wait, if the memory is pinned, as training's loader has it
        copying = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        waits = (
            copying and devices | made == {"cpu", "cuda"} and not (kwargs.get("non_blocking") or args[2:] == (True,))
        )
        if waits or "cuda" in devices and "cpu" in made:
            if not self.copies:
                raise Waits(f"{func} copies between CPU and GPU, and waits until all before it is done")
            self.copies -= 1
        return out


@contextlib.contextmanager
def no_waiting(*reads, copies=0):
    """A context in which it is an error if the CPU waits for the GPU, or less often than said.

    Args:
        reads: the numbers that the CPU reads from the GPU, in turn.
        copies: how many copies between the two it waits for.
    """
    with Waiting(list(reads), copies) as waiting:
        yield
    if waiting.reads or waiting.copies:
        raise Waits(f"not read: {waiting.reads}; not copied: {waiting.copies}")


def real(build, *args, **kwargs):
    """build(...), whose tensors have values: a network, for example, that goes to the fake GPU afterwards."""
    with unset_fake_temporarily():
        return build(*args, **kwargs)


def assert_on(device, *trees):
    """Every tensor of lists, tuples and dicts is on that device, and there is one."""
    leaves = [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]
    assert leaves and all(leaf.device == device for leaf in leaves), [leaf.device for leaf in leaves]


@contextlib.contextmanager
def fake_cuda(monkeypatch):
    """FakeTensorMode, and what a CUDA build of torch asks the missing driver for, done in Python."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.nn.Module, "_apply", apply)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def apply(module, function, recurse=True):
    """Module._apply by new parameters: torch cannot exchange fake ones in place."""
    for child in module.children():
        apply(child, function)
    for name, weight in module._parameters.items():
        if weight is not None:
            module._parameters[name] = torch.nn.Parameter(function(weight.detach()), weight.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def backward(loss):
    """loss.backward() by gradients of 0: torch's engine asks the driver for the streams of CUDA tensors."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += [other for other, _ in node.next_functions if other is not None]
            if hasattr(node, "variable"):  # a weight that the loss depends on
                node.variable.grad = torch.zeros_like(node.variable)
