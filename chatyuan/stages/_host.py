"""Settings of the process that make a host faster: `configure` early, `imported` after imports.

1. On CPU every step allocates and frees its temporaries, hundreds of MiB. glibc returns them to the
   kernel at once and gets them back as pages that fault and are cleared: 150,000 faults a step of a
   22.7M-parameter model, a fifth of its time. Kept, they cost nothing, and memory peaks no higher.
   Only the main thread's arena can keep them, so programs run in the thread that calls them
   (`imported`). One arena for all threads would do too, but then the compiler's threads wait
   for each other: compilation takes half as long again.
2. LLVM's second and third level of optimisation make the programs no faster (their time is in
   libraries and memory) and compiling longer: by a fifth for a training step, fourfold for random
   bits.
3. Compiled programs are kept on disk, so that the second start of a run compiles nothing.
4. On accelerators XLA is told to compute while devices communicate (`_overlap`).
5. TensorFlow, where a cache is built, keeps its greetings to itself.
"""

import ctypes
import gc
import importlib.util
import os
import pathlib
import sys

from chatyuan.stages import _overlap

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# Kind of device -> the packages that bring it to jax, and its names in JAX_PLATFORMS.
_PLUGINS = {
    "gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin"),
    "tpu": ("libtpu",),
}
_PLATFORMS = {"gpu": {"gpu", "cuda", "rocm"}, "tpu": {"tpu"}}


def configure() -> None:
    """Applies what this module's text says; what the user's environment sets already is kept."""
    if on_cpu():
        keep_freed_memory()
        compile_quickly()
    _overlap.apply(accelerators())
    keep_compiled_programs()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def imported() -> None:
    """To be called between the imports of a stage, of which jax may be one, and jax's first use."""
    if not gc.isenabled():  # run.py has seen to that
        gc.freeze()  # modules stay: what they hold need never be looked at
        gc.enable()
    jax = sys.modules.get("jax")
    # jax reads this setting from no environment variable.
    if jax is not None and on_cpu():
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def on_cpu() -> bool:
    """Whether jax will compute on the CPU, as far as can be told without starting it."""
    chosen = os.environ.get("JAX_PLATFORMS", "")
    if chosen:
        return chosen == "cpu"
    return not accelerators()


def accelerators() -> list[str]:
    """Kinds of devices ("gpu", "tpu") whose plugin is installed and not ruled out by the user."""
    chosen = set(filter(None, os.environ.get("JAX_PLATFORMS", "").split(",")))
    return [
        kind
        for kind, plugins in _PLUGINS.items()
        if any(importlib.util.find_spec(name) for name in plugins)
        and (not chosen or chosen & _PLATFORMS[kind])
    ]


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


def compile_quickly() -> None:
    """Lowers LLVM's level of optimisation; before jax's first use."""
    name, flags = "--xla_backend_optimization_level", os.environ.get("XLA_FLAGS", "")
    if name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {name}=1".strip()


def keep_compiled_programs() -> None:
    """Names a folder for jax's compilation cache and has it keep all but the smallest programs.

    Through the environment, so that jax need not be imported for it and child processes inherit it.
    """
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(home) / "chatyuan" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
