"""When a call goes through torch's dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import jitgemm
from jitgemm.ops.dispatch import needs_dispatch


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def test_plain_tensors_go_directly() -> None:
    assert not needs_dispatch()
    assert not needs_dispatch(torch.ones(1), None, torch.nn.Parameter(torch.ones(1)))


def test_subclasses_and_fake_tensors_are_dispatched() -> None:
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(1))
    assert needs_dispatch(torch.ones(1), fake)
    assert needs_dispatch(None, torch.ones(1).as_subclass(Subclass))


def test_modes_are_dispatched() -> None:
    x = torch.ones(1)
    with FakeTensorMode():
        assert needs_dispatch(x)
    with TorchFunctionMode():
        assert needs_dispatch(x)
    assert not needs_dispatch(x)


def test_a_dispatch_mode_sees_one_operator() -> None:
    x = torch.randn(4, 200)
    expected = jitgemm.per_token_cast_to_fp8(x)
    with Recorder() as outer, Recorder() as inner:
        actual = jitgemm.per_token_cast_to_fp8(x)
    assert outer.names == inner.names == ["jitgemm.per_token_cast_to_fp8.default"]
    assert torch.equal(actual[1], expected[1])


def test_compiled_code_holds_the_operator() -> None:
    seen: list[bool] = []
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(needs_dispatch(x))
        sf: torch.Tensor = jitgemm.per_token_cast_to_fp8(x)[1]
        return sf

    torch.compile(function, backend=backend, fullgraph=True)(torch.randn(4, 200))
    assert seen == [True]
    assert "jitgemm.per_token_cast_to_fp8" in graphs[0].code
