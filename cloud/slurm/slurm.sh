#!/usr/bin/env bash
# jaxtune on a SLURM cluster with GPUs. Run it on a login node, from a clone that all nodes see.
#
#   slurm.sh submit --name NAME --nodes 2 --gpus 8 [CONFIG.yaml] [key=value ...]
#
# The same words fit all commands: change the first one.
#
# submit   queue the job; it queues itself again before the time limit and goes on, until the run has ended
# status   the job in the queue        logs   follow its log        cancel   have it save and end
#
#   --name NAME        of the job
#   --nodes N          machines (1)
#   --gpus N           of each machine; one task for each, as jax expects it under SLURM
#   --time LIMIT       of one start, 24:00:00 say; the cluster's default otherwise
#   --grace SECONDS    before that limit, to finish an update and save (300)
#   --restarts N       how often it is queued again (50)
#   --python PATH      of the environment with jaxtune[cuda] (python3 of PATH)
#   --logs FOLDER      (the current folder)
#   --sbatch FLAG      one more flag for sbatch, --sbatch=--partition=gpu say; may be repeated
#   --dry-run          print every command, run none
#
# Exit codes: 0 queued; 1 error; 2 usage.
set -euo pipefail
# shellcheck source=cloud/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

NAME='' NODES=1 GPUS='' TIME='' GRACE=300 RESTARTS=50 LOGS=. FLAGS=() REST=()

main() {
  local command=${1:-}
  case $command in
    '') usage_error "no command: submit, status, logs, cancel" ;;
    -h | --help) print_help "$0" && exit 0 ;;
    submit | status | logs | cancel) shift ;;
    *) usage_error "$command: expected submit, status, logs or cancel" ;;
  esac
  read_options "$@"
  OURS=(--user="$(id -un)" --name="$NAME")
  QUEUE=(squeue "${OURS[@]}" --noheader)
  "command_$command"
}

take_flag() { return 1; }

take_value() {
  case $1 in
    --name) NAME=$2 ;;
    --nodes) NODES=$2 ;;
    --gpus) GPUS=$2 ;;
    --time) TIME=$2 ;;
    --grace) GRACE=$2 ;;
    --restarts) RESTARTS=$2 ;;
    --python) PYTHON=$2 ;;
    --logs) LOGS=$2 ;;
    --sbatch) FLAGS+=("$2") ;;
    *) return 1 ;;
  esac
}

read_options() {
  read_words "$@"
  plain_name --name "$NAME"
  whole_number --nodes "$NODES"
  whole_number --grace "$GRACE"
  whole_number --restarts "$RESTARTS"
}

command_submit() {
  local job pause=$PAUSE attempt output
  [ -n "$GPUS" ] || usage_error "--gpus is missing: GPUs of each machine"
  whole_number --gpus "$GPUS"
  split_words ${REST[@]+"${REST[@]}"}
  [ -n "$OUTPUT" ] || usage_error "output is missing: a folder that all machines see, or a bucket"
  [ -d "$LOGS" ] || usage_error "--logs $LOGS: no such folder"
  need sbatch squeue
  refuse_if_queued
  for ((attempt = 1; ; attempt++)); do
    if output=$(ask 1 sbatch --parsable --job-name="$NAME" --nodes="$NODES" --ntasks-per-node="$GPUS" \
      --gpus-per-node="$GPUS" --requeue --signal="TERM@$GRACE" --open-mode=append --output="$LOGS/$NAME-%j.log" \
      ${TIME:+--time="$TIME"} ${FLAGS[@]+"${FLAGS[@]}"} "$CLOUD/slurm/job.sh" "$CLOUD" "$RESTARTS" "$PYTHON" \
      ${CONFIG:+"$CONFIG"} ${WORDS[@]+"${WORDS[@]}"} 2>&1); then
      break
    fi
    say "$output"
    case $output in
      *"imed out"* | *"nable to contact"* | *emporarily*) ;;
      *) fail "sbatch refused the job" ;;
    esac
    # It may have been queued all the same, and two jobs must not work on one output.
    job=$("${QUEUE[@]}" --format=%i 2>/dev/null) || job=''
    if [ -n "$job" ]; then
      output=$job
      break
    fi
    [ "$attempt" -lt "$ATTEMPTS" ] || fail "the job could not be queued, $ATTEMPTS times; look for it with: $(quoted "${QUEUE[@]}")"
    sleep "$pause"
    pause=$((pause * 2))
  done
  job=${output##*$'\n'}
  job=${job%%;*} # with a cluster's name behind it
  [ "$DRY_RUN" = yes ] || say "job $job is queued; its log: $LOGS/$NAME-$job.log; to end it: slurm.sh cancel --name $NAME"
}

refuse_if_queued() {
  local job
  job=$(ask '' "${QUEUE[@]}" --format=%i) || fail "squeue does not answer"
  [ -z "$job" ] || fail "job $job is called $NAME already: cancel it, or take another --name"
}

command_status() {
  need squeue
  run "${QUEUE[@]}" --format='%i %T %M %R'
}

# The logs of all jobs of this name: a job that was queued again writes on in its own.
command_logs() {
  if [ "$DRY_RUN" = yes ]; then run tail -n 100 -F "$LOGS/$NAME-*.log" && return; fi
  ls "$LOGS/$NAME"-*.log >/dev/null 2>&1 || fail "$LOGS/$NAME-*.log: no such file yet"
  tail -n 100 -F "$LOGS/$NAME"-*.log
}

# The batch shell first, so that it does not queue the job again; then the tasks, which save in their own time. A plain
# scancel kills them after the cluster's KillWait, 30 seconds as a rule.
command_cancel() {
  need scancel
  if ! {
    retry run scancel "${OURS[@]}" --state=PENDING &&
      retry run scancel "${OURS[@]}" --state=RUNNING --batch --signal=TERM &&
      retry run scancel "${OURS[@]}" --state=RUNNING --signal=TERM
  }; then
    fail "the job could not be ended; the last resort, without saving: $(quoted scancel "${OURS[@]}")"
  fi
}

main "$@"
