"""The launch scripts: their syntax, what they would run, and what the Slurm job does when told."""

import os
import pathlib
import shlex
import signal
import subprocess
import time

import pytest

from chatyuan import main

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
RUN = ["pretrain", "--gin_file=a b.gin", "--gin.MESH={'data': -1}"]
# What each needs besides the stage.
NEEDED = {
    "gpu_box.sh": [],
    "slurm.sh": ["--nodes=2"],
    "tpu_pod.sh": ["--name=pod", "--zone=z"],
}


def launch(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "launch" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


def dry(name: str, *options: str) -> str:
    done = launch(name, *NEEDED[name], *options, "--dry_run", *RUN)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ran(words: list[str]) -> list[str]:
    """The arguments of run.py among these words, checked by the parser that will read them."""
    arguments = words[words.index("run.py") + 1 :]
    command = main.parse(arguments)
    assert command.stage == "pretrain" and command.gin_files == ["a b.gin"]
    assert command.bindings == ["MESH={'data': -1}"]
    assert not command.flags.keys() - main.training_flags("pretrain").keys()
    return arguments


def test_there_is_one_for_each_place():
    assert [path.name for path in SCRIPTS] == sorted(NEEDED)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_syntax_usage_and_mistakes(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")
    told = launch(path.name, "--help")
    assert told.returncode == 0 and "--dry_run" in told.stdout
    assert "Which stage?" in launch(path.name, *NEEDED[path.name]).stderr
    for wrong in ("--restart=3", "--restarts=many"):
        refused = launch(path.name, *NEEDED[path.name], wrong, "--dry_run", "pretrain")
        assert refused.returncode == 2 and wrong in refused.stderr
    for missing in NEEDED[path.name]:
        rest = [option for option in NEEDED[path.name] if option != missing]
        refused = launch(path.name, *rest, "--dry_run", "pretrain")
        assert refused.returncode == 2
        assert f"{missing.partition('=')[0]}=" in refused.stderr.splitlines()[0]


def test_gpu_box():
    words = shlex.split(dry("gpu_box.sh", "--gpus=2,3", "--restarts=5"))
    assert words[:2] == ["env", "CUDA_VISIBLE_DEVICES=2,3"]
    assert ran(words)[-2:] == ["--process_count=1", "--restart_on_failure=5"]
    assert "CUDA" not in dry("gpu_box.sh")


def test_tpu_pod():
    options = ("--project=p", "--dir=my clone", "--python=env/bin/python")
    words = shlex.split(dry("tpu_pod.sh", *options))
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert {"--zone=z", "--worker=all", "--project=p"} <= set(words)
    remote = shlex.split(next(w for w in words if w.startswith("--command="))[len("--command=") :])
    assert remote[:3] == ["cd", "my clone", "&&"]
    assert ran(remote)[-1] == "--restart_on_failure=3"
    assert remote[3:5] == ["exec", "env/bin/python"]
    assert "nohup" in dry("tpu_pod.sh", "--detach")
    stop = launch("tpu_pod.sh", *NEEDED["tpu_pod.sh"], "--stop", "--dry_run").stdout
    assert "pkill" in stop and "-TERM" in stop


def test_slurm():
    text = dry("slurm.sh", "--gpus_per_node=4", "--grace=120", "--sbatch=--partition=gpu")
    words = shlex.split(text.splitlines()[0].partition("<<")[0])
    assert words[0] == "sbatch" and "--requeue" in words
    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--partition=gpu"} < set(words)
    assert "--signal=B:USR1@120" in words
    srun = shlex.split(next(x for x in text.splitlines() if x.startswith("srun ")))
    # JAX would take one GPU for the one process of each node.
    assert "JAX_LOCAL_DEVICE_IDS=0,1,2,3" in srun
    assert ran(srun[: srun.index("</dev/null")])[-1] == "--restart_on_failure=3"
    assert "JAX_LOCAL" not in dry("slurm.sh", "--gpus_per_node=4", "--tasks_per_node=4")
    refused = launch("slurm.sh", "--nodes=2", "--gpus_per_node=4", "--tasks_per_node=2", "pretrain")
    assert refused.returncode == 2 and "--tasks_per_node=2" in refused.stderr


@pytest.mark.parametrize("told", [True, False])
def test_the_slurm_job_hands_the_signal_on_and_queues_again(tmp_path, told):
    """With an srun that saves for a second when told, and a scontrol that notes its words."""
    text = dry("slurm.sh")
    batch = tmp_path / "batch.sh"
    batch.write_text(text.partition("<<'BATCH'\n")[2].removesuffix("BATCH\n"))
    (tmp_path / "srun").write_text(
        "#!/bin/bash\ntrap 'sleep 1; touch saved; exit 0' USR1\ntouch begun\n"
        + ("while :; do sleep 0.1; done\n" if told else "exit 7\n")
    )
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$@" >asked\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    job = subprocess.Popen(["bash", str(batch)], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 20
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    if told:
        job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == (0 if told else 7)
    assert (tmp_path / "saved").exists() == told
    asked = tmp_path / "asked"
    assert (asked.read_text().split() if asked.exists() else None) == (
        ["requeue", "42"] if told else None
    )
