"""A policy's own modules behind the engines' interface."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from robopolicy.errors import UserError
from robopolicy.export.torch_session import TorchSession
from robopolicy.inference.session import TensorSpec
from tests.policies.test_contract import batch_of, make


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def denoiser(rows=None):
    """A small policy's denoiser, the specs of its borders, and inputs."""
    policy = make("consistency actor").eval()
    graph = policy.export_graphs({"observation.state": batch_of(policy, 3)["observation.state"]})["denoiser"]
    inputs = tuple(
        TensorSpec(name, tuple(v.shape) if name in graph.shared else (rows, *v.shape[1:]), str(v.dtype)[6:])
        for name, v in zip(graph.names, graph.inputs, strict=True)
    )
    outputs = (TensorSpec(graph.outputs[0], (rows, *graph.inputs[0].shape[1:])),)
    x = torch.randn(graph.inputs[0].shape, generator=torch.Generator().manual_seed(0))
    values = dict(zip(graph.names, (x, *graph.inputs[1:]), strict=True))
    return graph.module, inputs, outputs, values


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_it_computes_what_the_module_computes(compiled):
    module, inputs, outputs, values = denoiser()
    with torch.no_grad():
        wanted = module(*values.values()).numpy()
    with TorchSession(module, inputs, outputs, compiled=compiled) as session:
        assert session.name == ("torch-compile" if compiled else "torch")
        session.warmup(runs=1, rows=3)
        found = session({k: v.numpy() for k, v in values.items()})
    assert list(found) == [outputs[0].name]
    np.testing.assert_allclose(found[outputs[0].name], wanted, atol=1e-5)


class Passing(nn.Module):
    """Gives an input back, and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.ones(2))

    def forward(self, x, task):
        return x, self.kept, task


def test_arrays_that_come_back_belong_to_the_caller():
    specs = [TensorSpec("x", (None, 2)), TensorSpec("task", (None,), "int64")]
    outputs = [TensorSpec("y", (None, 2)), TensorSpec("kept", (2,)), TensorSpec("same", (None,), "int64")]
    session = TorchSession(Passing(), specs, outputs)
    x, task = np.zeros((3, 2), np.float32), np.arange(3)
    x.setflags(write=False)
    found = session({"x": x, "task": task})
    for value in found.values():
        value += 7
    assert not x.any() and task.tolist() == [0, 1, 2]
    again = session({"x": x, "task": task})
    assert again["kept"].tolist() == [1, 1] and again["same"].dtype == np.int64 and not again["y"].any()


class Breaking(nn.Module):
    """Cannot be captured in one graph."""

    def forward(self, x):
        x = x * 2
        torch._dynamo.graph_break()
        return x + 1


def test_a_module_with_breaks_is_compiled_in_parts(caplog):
    session = TorchSession(Breaking(), [TensorSpec("x", (2,))], [TensorSpec("y", (2,))], compiled=True)
    for _ in range(2):
        assert session({"x": np.array([1, 2], np.float32)})["y"].tolist() == [3, 5]
    told = [record.message for record in caplog.records if record.name == "robopolicy.export.torch_session"]
    assert len(told) == 1 and told[0].startswith("Breaking is compiled in several graphs")


def test_half_precision_inside_is_float32_at_the_border():
    module = nn.Sequential(nn.Linear(2, 2)).to(torch.bfloat16)
    module.register_forward_pre_hook(lambda _, inputs: tuple(x.bfloat16() for x in inputs))
    session = TorchSession(module, [TensorSpec("x", (None, 2))], [TensorSpec("y", (None, 2))])
    assert session({"x": np.ones((1, 2), np.float32)})["y"].dtype == np.float32


def test_threads_are_set_for_the_process():
    TorchSession(Passing(), [], [], threads=2)
    assert torch.get_num_threads() == 2


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"'no-such-compiler' is not found.*apt install g\+\+"):
        TorchSession(Passing(), [], [], compiled=True)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="sees no GPU here. Use device=cpu"):
            TorchSession(Passing(), [], [], device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_it_runs_on_a_gpu(compiled):
    module, inputs, outputs, values = denoiser()
    with torch.no_grad():
        wanted = module(*values.values()).numpy()
    session = TorchSession(module, inputs, outputs, device="cuda", compiled=compiled)
    for _ in range(5):  # warm-up, capture, replay
        found = session({k: v.numpy() for k, v in values.items()})[outputs[0].name]
        np.testing.assert_allclose(found, wanted, atol=1e-3)
