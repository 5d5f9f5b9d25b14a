"""Helpers for callers, under the peer's names."""

from jitgemm.utils import layout as layout
from jitgemm.utils import math as math
from jitgemm.utils.layout import *  # noqa: F403
from jitgemm.utils.math import *  # noqa: F403
