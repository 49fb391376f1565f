"""Where the processes of a run meet: flags, environments, messages. No process is connected."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from chatyuan import distributed, main, stages
from chatyuan.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXPLICIT = {"coordinator_address": "10.0.0.1:1234", "process_count": "4", "process_index": "3"}
SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """An environment of no cluster."""
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_")):
            monkeypatch.delenv(name)


def test_explicit_flags():
    found = distributed._settings({**EXPLICIT, "initialization_timeout": "20"})
    assert found == {
        "coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 3,
        "initialization_timeout": 20, "cluster_detection_method": "deactivate",
    }  # fmt: skip
    assert distributed._settings({**EXPLICIT, "multiprocess_gpu": None}) is not None


def test_one_process_alone_connects_nothing():
    assert distributed._settings({}) is None
    assert distributed.exchange("a") == ["a"] and distributed.first_word("") == ""
    assert not distributed.preempted(3)
    distributed.finish(1, "nobody else is there")  # returns


def test_slurm_and_open_mpi_are_left_to_jax(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert distributed._settings({})["cluster_detection_method"] == "slurm"
    assert distributed._settings({"process_count": "1"}) is None
    from jax._src.clusters.slurm_cluster import SlurmCluster

    assert SlurmCluster.is_env_present()
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert distributed._settings({}) is None
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="Open MPI 5 .* --process_count=.OMPI_COMM_WORLD_SIZE"):
        distributed._settings({})
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1:34911")
    assert distributed._settings({})["cluster_detection_method"] == "ompi"


MISTAKES = {
    "coordinator_address=somewhere": "should be HOST:PORT",
    "process_index=1": "--process_index alone connects nothing: give --coordinator_address and",
    "process_count=4": "--process_count alone connects nothing",
    "coordinator_address=a:1 process_count=2 process_index=2": "must be less than --process_count",
    "process_count=many": "should be a whole number of at least 1",
    "multiprocess_gpu": "say where the others are: --coordinator_address=HOST:PORT",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes(line):
    pairs = [word.partition("=") for word in line.split()]
    with pytest.raises(UserError) as error:
        distributed._settings({name: value if equals else None for name, equals, value in pairs})
    assert MISTAKES[line] in str(error.value)


def test_every_stage_that_trains_takes_the_flags(capsys):
    for path in pathlib.Path(stages.__path__[0]).glob("[a-z]*.py"):
        stage, text = path.stem.rstrip("_"), path.read_text(encoding="utf-8")
        trains = "_supervised.run(" in text or " fit(\n" in text
        assert bool(main.training_flags(stage)) == trains, f"{stage}: TRAINS = True"
    assert main.main(["pretrain", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  --{name} " in text for name in main.TRAINING_FLAGS)
    # As absl reads them, the value may be the next word.
    command = main.parse(["pretrain", "--process_count", "2", "--multiprocess_gpu", "word"])
    assert command.flags == {"process_count": "2", "multiprocess_gpu": None}
    assert main.main(["tokenizer", "--process_count=2"]) == 2
    assert "tokenizer has no flag --process_count" in capsys.readouterr().err


def test_a_coordinator_that_does_not_answer():
    """JAX aborts with a stack trace; we end with one message before that."""
    code = (
        "from chatyuan import distributed; distributed.connect({'coordinator_address': "
        "'localhost:9', 'process_count': '2', 'process_index': '1', 'initialization_timeout': '2'})"
    )
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and time.monotonic() - begin < 40
    assert done.stderr.splitlines()[-1].startswith(
        "process 1 of 2 at the coordinator localhost:9: it does not answer"
    )
    assert "Waited 2 s (--initialization_timeout)." in done.stderr
