"""Starts `run.py` in several processes that form one run, on CPU devices of their own."""

import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """The environment of a process that sees so many CPU devices."""
    name = "--xla_force_host_platform_device_count"
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(name)]
    return {
        **os.environ, "PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*flags, f"{name}={devices}"]),
    }  # fmt: skip


class Job:
    """The processes of one run; their output goes to files."""

    def __init__(
        self, folder: pathlib.Path, words: Sequence[str], *, count: int, devices: int,
        commands: dict[int, Sequence[str]] | None = None,
    ) -> None:  # fmt: skip
        """Starts `run.py WORDS` `count` times; `commands` has other words for some of them."""
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.paths = [folder / f"process{index}.txt" for index in range(count)]
        self.processes = []
        for index in range(count):
            meet = [] if count == 1 else [
                f"--coordinator_address=localhost:{port}", f"--process_count={count}",
                f"--process_index={index}", "--initialization_timeout=60",
            ]  # fmt: skip
            chosen = (commands or {}).get(index, words)
            with self.paths[index].open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "run.py", *chosen, *meet], cwd=ROOT, stdout=file,
                        stderr=subprocess.STDOUT, env=environment(devices),
                    )
                )  # fmt: skip

    def output(self, index: int) -> str:
        """What a process has printed so far."""
        return self.paths[index].read_text(errors="replace")

    def wait_for(self, text: str, index: int = 0, seconds: float = 90) -> None:
        """Waits until a process has printed a text."""
        end = time.monotonic() + seconds
        while text not in self.output(index):
            assert time.monotonic() < end, self.output(index)
            assert self.processes[index].poll() is None, self.output(index)
            time.sleep(0.02)

    def wait(self, seconds: float = 120) -> list[int]:
        """Waits for all; returns their statuses."""
        end = time.monotonic() + seconds
        try:
            return [p.wait(max(end - time.monotonic(), 1)) for p in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError("\n".join(map(self.output, range(len(self.paths))))) from None
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
