#!/usr/bin/env bash
# One machine with GPUs: one process uses all of them, started again when it dies.
set -euo pipefail

usage() {
  cat <<'TEXT'
bash launch/gpu_box.sh [OPTION]... STAGE [ARGUMENT]...

STAGE trains: pretrain, sft and the like; its arguments are those of run.py.

  --gpus=0,1      use these only (CUDA_VISIBLE_DEVICES); all if not given
  --restarts=N    start again after N failures without a new checkpoint (--restart_on_failure); 3
  --log=FILE      go on without the terminal, output to FILE; kill -TERM saves and ends the run
  --dry_run       print the command
TEXT
}
wrong() { echo "$1" >&2; usage >&2; exit 2; }

gpus="" restarts=3 log="" dry_run=""
while [[ "${1:-}" == -* ]]; do
  case "$1" in
    --gpus=*) gpus="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --log=*) log="${1#*=}" ;;
    --dry_run) dry_run=1 ;;
    -h | --help) usage; exit 0 ;;
    *) wrong "$1 is unknown; options of run.py follow the stage." ;;
  esac
  shift
done
[[ $# -gt 0 ]] || wrong "Which stage?"
[[ "$restarts" =~ ^[0-9]+$ ]] || wrong "--restarts=$restarts should be a whole number."

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# process_count=1: a shell inside an allocation of Slurm is no run of several processes.
command=(python run.py "$@" --process_count=1 "--restart_on_failure=$restarts")
[[ -z "$gpus" ]] || command=(env "CUDA_VISIBLE_DEVICES=$gpus" "${command[@]}")
if [[ -n "$dry_run" ]]; then
  printf '%q ' "${command[@]}"
  [[ -z "$log" ]] || printf '>>%q 2>&1 </dev/null &' "$log"
  echo
elif [[ -n "$log" ]]; then
  nohup "${command[@]}" >>"$log" 2>&1 </dev/null &
  echo "Process $!, output in $log."
else
  exec "${command[@]}"
fi
