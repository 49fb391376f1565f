"""What all tests share: fake devices, a compilation cache, strict promotion where it counts."""

import gc
import os
import pathlib
import tempfile
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
# Programs of a few steps: with run.py's level 1 a module of them takes a sixth longer. What is
# measured (the quickstart) runs without this.
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
# Compile time dominates the suite: one cache for this run and for the subprocesses it starts.
_CACHE = pathlib.Path(tempfile.gettempdir()) / "chatyuan-test-jax-cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
if _WORKER := os.environ.get("PYTEST_XDIST_WORKER"):  # jax's cache is for one writer at a time
    os.environ["JAX_COMPILATION_CACHE_DIR"] += f"/{_WORKER}"
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax  # noqa: E402
import pytest  # noqa: E402

STRICT_FOLDERS = ("ops", "kernels", "models")
# Each compiled program holds memory maps, and Linux ends a process at 65,530 of them (a failed
# allocation inside the compiler): this many are let go of. The cache on disk makes that cheap.
MANY_MAPS = 10_000
# A collection of garbage walks all that is alive, and traced programs are millions of objects: as
# often as Python's defaults have it, that is up to a quarter of a worker's time.
gc.set_threshold(20_000, 10, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first: whatever else there is fits beside it."""
    items.sort(key=lambda item: item.path.name != "test_quickstart.py")


def pytest_collection_finish() -> None:
    """What is imported by now stays: no collection need look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the array rooms an accidental promotion of dtype or rank is an error."""
    folder = pathlib.Path(str(request.node.path)).parent.name
    if folder not in STRICT_FOLDERS:
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Lets go of the programs of earlier modules once there are many."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_text(encoding="utf-8").count("\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()
