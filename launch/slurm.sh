#!/usr/bin/env bash
# A Slurm cluster: submits one job, whose tasks find each other by Slurm's own variables.
#
# Before the time limit Slurm signals the batch script. It hands the signal to the tasks, which save
# and end with status 0, and puts the job back into the queue, where it goes on from the checkpoint.
# A task that dies is started again in its place; a node that dies requeues the job (--requeue).
set -euo pipefail

usage() {
  cat <<'TEXT'
bash launch/slurm.sh --nodes=N [OPTION]... STAGE [ARGUMENT]...

STAGE trains: pretrain, sft and the like; its arguments are those of run.py.

  --nodes=N            nodes of the job
  --gpus_per_node=N    GPUs of each node; none if not given
  --tasks_per_node=N   processes on each node: 1 (a process uses all GPUs of its node), or as many
                       as GPUs
  --time=TIME          limit of one stay in the queue, as sbatch writes it; 24:00:00
  --grace=SECONDS      before the limit the run is told to save; 300
  --restarts=N         start a task again after N failures without a new checkpoint; 3
  --sbatch=OPTION      one more option of sbatch, such as --sbatch=--partition=gpu; may be repeated
  --dry_run            print the command and the batch script

MODEL_DIR must lie on a file system that all nodes share.
TEXT
}
wrong() { echo "$1" >&2; usage >&2; exit 2; }

nodes="" gpus="" tasks=1 limit=24:00:00 grace=300 restarts=3 dry_run="" more=()
while [[ "${1:-}" == -* ]]; do
  case "$1" in
    --nodes=*) nodes="${1#*=}" ;;
    --gpus_per_node=*) gpus="${1#*=}" ;;
    --tasks_per_node=*) tasks="${1#*=}" ;;
    --time=*) limit="${1#*=}" ;;
    --grace=*) grace="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --sbatch=*) more+=("${1#*=}") ;;
    --dry_run) dry_run=1 ;;
    -h | --help) usage; exit 0 ;;
    *) wrong "$1 is unknown; options of run.py follow the stage." ;;
  esac
  shift
done
[[ -n "$nodes" ]] || wrong "How many nodes? --nodes=N is missing."
[[ $# -gt 0 ]] || wrong "Which stage?"
for number in "--nodes=$nodes" "--tasks_per_node=$tasks" "--grace=$grace" \
  "--restarts=$restarts" ${gpus:+"--gpus_per_node=$gpus"}; do
  [[ "${number#*=}" =~ ^[0-9]+$ ]] || wrong "$number should be a whole number."
done
if ((tasks > 1)) && [[ "$tasks" != "$gpus" ]]; then
  wrong "--tasks_per_node=$tasks should be 1 or the GPUs of a node (--gpus_per_node=${gpus:-none})."
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
submit=(
  sbatch "--nodes=$nodes" "--ntasks-per-node=$tasks" "--time=$limit" "--signal=B:USR1@$grace"
  --requeue --open-mode=append "--job-name=chatyuan-$1" "--output=chatyuan-$1-%j.log"
)
[[ -z "$gpus" ]] || submit+=("--gpus-per-node=$gpus")
submit+=(${more[@]+"${more[@]}"})
# The tasks of a node see all of its GPUs. Under Slurm JAX takes for a process the one GPU of its
# local number, unless it is told which.
visible=()
if ((tasks == 1 && ${gpus:-0} > 1)); then
  visible=(env "JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))")
fi
run="$(printf '%q ' srun --kill-on-bad-exit=1 ${visible[@]+"${visible[@]}"} \
  python run.py "$@" "--restart_on_failure=$restarts")"
batch="$(
  cat <<TEXT
#!/usr/bin/env bash
set -uo pipefail
told= step=
trap 'told=1; kill -USR1 "\$step"' USR1
$run</dev/null &
step=\$!
wait "\$step"; status=\$?
# A signal ends a wait, not what is waited for.
while kill -0 "\$step" 2>/dev/null; do wait "\$step"; status=\$?; done
if [[ -n "\$told" && "\$status" == 0 ]]; then scontrol requeue "\$SLURM_JOB_ID"; fi
exit "\$status"
TEXT
)"
if [[ -n "$dry_run" ]]; then
  printf '%q ' "${submit[@]}"
  printf "<<'BATCH'\n%s\nBATCH\n" "$batch"
else
  exec "${submit[@]}" <<<"$batch"
fi
