"""Callbacks on what happens to kernels: for metrics, alarms and logs of a serving process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jitgemm.cache import logger
from jitgemm.errors import SettingsError
from jitgemm.families import KernelSpec, family_of

EVENTS = ("miss", "compile", "load")


@dataclass(frozen=True)
class KernelEvent:
    """What happened to one kernel.

    Args:
        event: ``miss``: it is in no cache; what follows depends on ``JITGEMM_JIT``. ``compile``: this process has
            compiled it. ``load``: it is on a device and can be launched.
        key: its name in the cache.
        kernel: what it is, for people.
        arch: its architecture, such as ``sm_90a``.
        seconds: what the caller waited for the compile, or for the load and all that came before it; 0 for a miss.
        source: of a load: ``memory``, ``disk``, ``remote`` or ``compiled``.
        device: of a load: ordinal of the device.
    """

    event: str
    key: str
    kernel: str
    arch: str
    seconds: float = 0.0
    source: str | None = None
    device: int | None = None


Callback = Callable[[KernelEvent], object]


class Hook:
    """A callback that is called until ``remove``."""

    def __init__(self, event: str, callback: Callback) -> None:
        self._event, self._callback = event, callback
        self._failed = False

    def remove(self) -> None:
        """Call it no more; may be called again."""
        _hooks[self._event].pop(self, None)

    def _call(self, event: KernelEvent) -> None:
        try:
            self._callback(event)
        except Exception:  # an observer must not break what it observes
            if not self._failed:
                self._failed = True
                logger.exception("a hook on %r failed; this is logged once", self._event)


_hooks: dict[str, dict[Hook, None]] = {event: {} for event in EVENTS}


def add_hook(event: str, callback: Callback) -> Hook:
    """Call ``callback`` with a ``KernelEvent`` at each ``miss``, ``compile`` or ``load`` of a kernel in this process.

    It runs in the thread of the call that caused the event, which waits for it. At a miss, other threads that need the
    same kernel wait too: a callback must not call kernels. What it raises is logged, once, and otherwise ignored.

    Returns:
        A handle; its ``remove()`` ends the calls.

    Raises:
        SettingsError: there is no such event, or the callback can't be called.
    """
    if event not in EVENTS:
        raise SettingsError(f"add_hook: event is {event!r}; accepted are {', '.join(EVENTS)}")
    if not callable(callback):
        raise SettingsError(f"add_hook: callback is {type(callback).__name__}; accepted is a function of one event")
    hook = Hook(event, callback)
    _hooks[event][hook] = None
    return hook


def emit(
    event: str, spec: KernelSpec, seconds: float = 0.0, *, source: str | None = None, device: int | None = None
) -> None:
    """Tell the hooks on ``event``; costs next to nothing where there is none."""
    hooks = list(_hooks[event])
    if not hooks:
        return
    from jitgemm.cache_key import cache_key

    what = KernelEvent(
        event, cache_key(spec), family_of(spec).describe(spec), spec.arch, seconds, source=source, device=device
    )
    for hook in hooks:
        hook._call(what)
