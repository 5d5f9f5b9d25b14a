"""Whether a call may run directly, or must be an operator that torch can see."""

from __future__ import annotations

import torch
from torch.compiler import is_compiling

_DIRECT_TYPES = frozenset({torch.Tensor, torch.nn.Parameter, type(None)})
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack


def needs_dispatch(*tensors: object) -> bool:
    """Whether a call on ``tensors`` (None for those not given) must go through ``torch.ops.jitgemm``.

    So it is under ``torch.compile``, in dispatch and function modes, and for tensor subclasses such
    as fake tensors.
    """
    # Every call passes here: some 0.3 us, most of it the three look-ups.
    if is_compiling() or _dispatch_modes() or _function_modes():
        return True
    return not _DIRECT_TYPES.issuperset(map(type, tensors))
