"""Settings of the process that make a host faster: `configure` first, `configure_jax` once imported.

1. On CPU every step allocates and frees its temporaries, hundreds of MiB. glibc returns them to the
   kernel at once and gets them back as pages that fault and are cleared: 150,000 faults a step of a
   22.7M-parameter model, a fifth of its time. Kept, they cost nothing, and memory peaks no higher.
   Only the main thread's arena can keep them, so programs run in the thread that calls them
   (`configure_jax`). One arena for all threads would do too, but then the compiler's threads wait
   for each other: compilation takes half as long again.
2. Compiled programs are kept on disk, so that the second start of a run compiles nothing.
3. TensorFlow, where a cache is built, keeps its greetings to itself.
"""

import ctypes
import importlib.util
import os
import pathlib
import sys

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_ACCELERATORS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def configure() -> None:
    """Applies what this module's text says; what the user's environment sets already is kept."""
    if on_cpu():
        keep_freed_memory()
    keep_compiled_programs()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def configure_jax() -> None:
    """Has programs on CPU run in the calling thread; before jax's first use, if it is imported.

    jax reads this from no environment variable, and not every stage imports it.
    """
    jax = sys.modules.get("jax")
    if jax is not None and on_cpu():
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def on_cpu() -> bool:
    """Whether jax will compute on the CPU, as far as can be told without starting it."""
    chosen = os.environ.get("JAX_PLATFORMS", "")
    if chosen:
        return chosen == "cpu"
    return not any(importlib.util.find_spec(name) for name in _ACCELERATORS)


def keep_freed_memory() -> bool:
    """Makes glibc's allocator keep what is freed; returns False where that is not possible.

    A process that computes on an accelerator is better off without: it would only keep the memory
    of what it has loaded.
    """
    if not sys.platform.startswith("linux") or any(
        name.startswith("MALLOC_") for name in os.environ
    ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}
    return all(mallopt(option, value) for option, value in settings.items())


def keep_compiled_programs() -> None:
    """Names a folder for jax's compilation cache and has it keep all but the smallest programs.

    Through the environment, so that jax need not be imported for it and child processes inherit it.
    """
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(home) / "chatyuan" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
