#!/usr/bin/env bash
# A TPU pod slice: runs the same command on all of its hosts, which find each other by the TPU's
# own metadata.
set -euo pipefail

usage() {
  cat <<'TEXT'
bash launch/tpu_pod.sh --name=TPU --zone=ZONE [OPTION]... STAGE [ARGUMENT]...

STAGE trains: pretrain, sft and the like; its arguments are those of run.py.

  --name=TPU       of the TPU VM, as in `gcloud compute tpus tpu-vm list`
  --zone=ZONE      its zone
  --project=ID     its project; gcloud's default if not given
  --dir=FOLDER     the clone of this repository on the hosts; chatyuan, below the home folder
  --python=PATH    the Python of the environment on the hosts; python3
  --restarts=N     start again after N failures without a new checkpoint (--restart_on_failure); 3
  --detach         go on without this terminal, output to FOLDER/run.log on each host
  --stop           no stage: tell the run to save and end, on all hosts
  --dry_run        print the command

The hosts need the clone and `pip install -c constraints.txt -e '.[tpu]'`; MODEL_DIR must lie on a
file system that all hosts share. On a preempted slice, start the same command again: it goes on
from the newest checkpoint.
TEXT
}
wrong() { echo "$1" >&2; usage >&2; exit 2; }

name="" zone="" project="" folder=chatyuan python=python3 restarts=3 detach="" stop="" dry_run=""
while [[ "${1:-}" == -* ]]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --dir=*) folder="${1#*=}" ;;
    --python=*) python="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --detach) detach=1 ;;
    --stop) stop=1 ;;
    --dry_run) dry_run=1 ;;
    -h | --help) usage; exit 0 ;;
    *) wrong "$1 is unknown; options of run.py follow the stage." ;;
  esac
  shift
done
[[ -n "$name" ]] || wrong "Which TPU? --name=TPU is missing."
[[ -n "$zone" ]] || wrong "Where is it? --zone=ZONE is missing."
[[ -n "$stop" || $# -gt 0 ]] || wrong "Which stage?"
[[ "$restarts" =~ ^[0-9]+$ ]] || wrong "--restarts=$restarts should be a whole number."

if [[ -n "$stop" ]]; then
  # The bracket keeps pkill from finding the shell that runs it.
  remote="pkill -TERM -f 'run[.]py .*--restart_on_failure='"
else
  run="$(printf '%q ' "$python" run.py "$@" "--restart_on_failure=$restarts")"
  remote="cd $(printf '%q' "$folder") && exec $run"
  [[ -z "$detach" ]] || remote="cd $(printf '%q' "$folder") && { nohup $run>>run.log 2>&1 </dev/null & }"
fi
command=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all "--command=$remote")
[[ -z "$project" ]] || command+=("--project=$project")
if [[ -n "$dry_run" ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
