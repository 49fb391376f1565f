"""The settings of the process do what they say; each is tried in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

LINUX_GLIBC = sys.platform.startswith("linux") and os.confstr("CS_GNU_LIBC_VERSION")


def child(code: str, **environment: str) -> dict:
    """Runs code that prints one JSON object, without what this test's process has set."""
    left_out = ("MALLOC_", "JAX_", "XLA_", "GLIBC_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    return json.loads(result.stdout)


FAULTS = """
import json, resource
import numpy as np
from chatyuan.stages import _host
done = _host.keep_freed_memory() if {keep} else None
for _ in range(3):
    np.ones(8 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(8 << 20)
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, done]))
"""


@pytest.mark.skipif(not LINUX_GLIBC, reason="glibc's allocator")
def test_freed_memory_is_kept():
    lost, _ = child(FAULTS.format(keep=False))
    kept, done = child(FAULTS.format(keep=True))
    assert done is True
    # 64 MiB ten times over: at least one fault a 2 MiB page without, none of them with.
    assert lost > 100 and kept < lost / 10


@pytest.mark.skipif(not LINUX_GLIBC, reason="glibc's allocator")
def test_the_users_allocator_settings_stay():
    _, done = child(FAULTS.format(keep=True), MALLOC_ARENA_MAX="4")
    assert done is False


STEPS = """
import json, os, resource
from chatyuan.stages import _host
_host.configure()
import jax, jax.numpy as jnp
_host.imported()
step = jax.jit(lambda x: jnp.cumsum(x, axis=0)[::-1] @ jnp.eye(128))
x = jnp.ones((65536, 128))
for _ in range(12):  # until both threads' arenas have grown, with other work on the cores
    x = step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    x = step(x).block_until_ready()
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""


@pytest.mark.skipif(not LINUX_GLIBC, reason="glibc's allocator")
def test_a_programs_temporaries_are_kept(tmp_path):
    """Else 32 MiB and more are given back each time: 8,000 faults, or 16 of huge pages."""
    common = {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    kept, lost = child(STEPS, **common), child(STEPS, MALLOC_ARENA_MAX="9", **common)
    assert kept < lost / 10, (kept, lost)


CONFIGURED = """
import json, os, sys
from chatyuan.stages import _host
_host.configure()
names = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
print(json.dumps({"jax": "jax" in sys.modules, "cpu": _host.on_cpu(),
                  **{name: os.environ.get(name) for name in names}}))
"""


def test_compiled_programs_get_a_folder(tmp_path):
    found = child(CONFIGURED, XDG_CACHE_HOME=str(tmp_path), JAX_PLATFORMS="cpu")
    assert found["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "chatyuan" / "jax")
    assert float(found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]) < 1
    assert found["cpu"] and not found["jax"]
    assert found["XLA_FLAGS"] == "--xla_backend_optimization_level=1"
    chosen = child(CONFIGURED, JAX_COMPILATION_CACHE_DIR="/elsewhere", JAX_PLATFORMS="cuda,cpu")
    assert chosen["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere" and not chosen["cpu"]
    assert chosen["XLA_FLAGS"] is None
    own = child(CONFIGURED, XLA_FLAGS="--xla_backend_optimization_level=3", JAX_PLATFORMS="cpu")
    assert own["XLA_FLAGS"] == "--xla_backend_optimization_level=3"


def test_jax_reads_the_folder(tmp_path):
    code = CONFIGURED.replace(
        "print(", "import jax\nx = jax.config.jax_compilation_cache_dir\nprint(", 1
    ).replace('"jax": "jax" in sys.modules', '"jax": x')
    found = child(code, XDG_CACHE_HOME=str(tmp_path), JAX_PLATFORMS="cpu")
    assert found["jax"] == found["JAX_COMPILATION_CACHE_DIR"]
