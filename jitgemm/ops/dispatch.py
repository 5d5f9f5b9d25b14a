"""Whether a call may run directly, or must be an operator that torch can see."""

from __future__ import annotations

import torch
from torch.compiler import is_compiling

_DIRECT_TYPES = frozenset({torch.Tensor, torch.nn.Parameter, type(None)})
dispatch_modes = torch._C._len_torch_dispatch_stack
function_modes = torch._C._len_torch_function_stack


def are_plain(*tensors: object) -> bool:
    """Whether no argument is of a subclass of tensor; None stands for one that was not given."""
    return _DIRECT_TYPES.issuperset(map(type, tensors))


def needs_dispatch(*tensors: object) -> bool:
    """Whether a call on ``tensors`` (None for those not given) must go through ``torch.ops.jitgemm``.

    So it is under ``torch.compile``, in dispatch and function modes, and for tensor subclasses such
    as fake tensors.
    """
    return bool(is_compiling() or dispatch_modes() or function_modes()) or not are_plain(*tensors)
