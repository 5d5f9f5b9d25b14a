"""The public operations: validate, plan, launch."""

from jitgemm.ops import library as library  # registers torch.ops.jitgemm.*
