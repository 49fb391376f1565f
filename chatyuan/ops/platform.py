"""What the program being traced will run on: this process's own devices, unless said otherwise."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def target_platform() -> str:
    """Returns the platform as jax names it: "cpu", "gpu" or "tpu".

    Whatever is chosen while tracing (kernels, sizes of chunks) asks here and not
    `jax.default_backend`, so that it can be planned and compiled for devices that are not attached.
    """
    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def targeting(platform: str | None) -> Iterator[None]:
    """Makes `target_platform` return `platform` inside a `with`; None changes nothing."""
    token = _TARGET.set(platform if platform is not None else _TARGET.get())
    try:
        yield
    finally:
        _TARGET.reset(token)
