"""Functions of flat tensors, compiled into one pass over memory, that prove themselves against their eager twins before they are used.

Both twins give the same bits, so which of them is used is a question of time alone.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any, Literal

import torch
from torch.utils.dlpack import from_dlpack

from mergeopt.errors import Failure

__all__ = ["Compiled", "How", "Write", "detached", "probe", "same_bits"]

How = Literal["auto", "eager", "compiled"]
"""Which twin is used: `auto` compiles once so much was computed that it pays, and does without where it cannot."""
Write = Callable[..., object]
"""A function that overwrites its first tensor, or the first of its first list."""

# Where compiled code may contract or approximate unless told otherwise; a compiler's version knows some of these.
EXACT = ("emulate_precision_casts", "eager_numerics.division_rounding", "eager_numerics.disable_ftz", "emulate_divison_rounding")
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
log = logging.getLogger(__name__)


class Compiled:
    """The compiled twin of some eager code.

    Args:
        function: what is compiled: writes what the eager twin writes.
        what: a name for it, in the plural, for the log.
        prove: runs compiled code on inputs of its own; returns whether it gave the eager twin's bits.
        pays: elements after which some seconds of compilation are earned back.
    """

    def __init__(self, function: Write, what: str, prove: Callable[[Write], bool], *, pays: int) -> None:
        self._function, self._what, self._prove, self._pays = function, what, prove, pays
        self._seen = 0
        self._run: Write | None = None
        self.refusal: str | None = None

    def ready(self, elements: int, how: How) -> bool:
        """Return whether to use this for so many more elements; compiles when that is worth its seconds, or when told to.

        Where it cannot be used, `refusal` says why, and one line of the log.

        Raises:
            Failure: told to use compiled code, where there is no compiler or it failed.
        """
        if how == "eager":
            return False
        self._seen += elements
        if self._run is None and self.refusal is None and (how == "compiled" or self._seen >= self._pays):
            self._compile()
        if self._run is None and how == "compiled":
            raise Failure(f"{self._what} cannot be made with compiled code here: {self.refusal}")
        return self._run is not None

    def __call__(self, *arguments: Any) -> bool:
        """Run compiled code; False where it could not, and nothing was changed.

        Args:
            arguments: the function's; tensors of two elements or more, in memory of their own (`detached`).
        """
        run = self._run
        return run is not None and self._guarded(lambda: _call(run, arguments))

    def _compile(self) -> None:
        log.info("compiling code for %s", self._what)
        # The compiler keeps a few variants (for settings of threads, say) per code object, and closures share one: give each its own.
        code = self._function
        own = FunctionType(code.__code__.replace(), code.__globals__, closure=code.__closure__)
        run: Write = torch.compile(own, fullgraph=True, dynamic=True, options=_exact())

        def prove() -> bool:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the compiler, about itself
                return self._prove(lambda *arguments: _call(run, arguments))

        if self._guarded(prove):
            self._run = run
        elif self.refusal is None:
            self._refuse("the compiled code gives other bits")

    def _guarded(self, work: Callable[[], bool]) -> bool:
        from torch._dynamo.exc import FailOnRecompileLimitHit  # the compiler takes a second to import

        try:
            return work()
        except (RuntimeError, OSError, ImportError, FailOnRecompileLimitHit) as error:  # no compiler, or one that failed
            self._refuse(" ".join(str(error).split())[:300] or type(error).__name__)
            return False

    def _refuse(self, reason: str) -> None:
        self._run, self.refusal = None, reason
        log.warning("%s are made without compiled code, to the same bits: %s", self._what, reason)


def _call(run: Write, arguments: tuple[Any, ...]) -> bool:
    # One mode, whatever the caller's: for another, code would be compiled anew.
    with torch.inference_mode(False), torch.no_grad():
        run(*arguments)
    return True


def _exact() -> dict[str, Any]:
    """Return this compiler's options that keep it from contracting and approximating arithmetic, as Triton does."""
    known = torch._inductor.list_options()
    return {name: True for name in EXACT if name in known}


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the same memory that is nobody's view: one drags what it is a view of into the conditions of compiled code."""
    if tensor._base is None and not tensor.storage_offset() and not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return from_dlpack(tensor)


def probe(rows: int, size: int, device: torch.device) -> torch.Tensor:
    """Return float32 [rows, size] of all magnitudes: ordinary, subnormal, huge, and signed zeros."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((rows, size), generator=generator)
    for place, scale in enumerate((1e-39, 1e-20, 1e20, 0.0), start=1):
        values[:, place::7] *= scale
    return values.to(device)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors of one float type are equal to the bit, signs of zeros included; NaN has no sign."""
    integer = INTEGERS[a.element_size()]
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())
