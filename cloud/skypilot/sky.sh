#!/usr/bin/env bash
# jaxtune as a managed job of SkyPilot, which finds machines, starts again after preemptions and deletes them at the end.
#
#   sky.sh up --name NAME --tpu v6e-8 [CONFIG.yaml] [key=value ...]
#   sky.sh up --name NAME --gpus H100:8 --nodes 2 [CONFIG.yaml] [key=value ...]
#
# The same words fit all commands: change the first one.
#
# up       submit the job and follow it (Ctrl-C leaves it running)
# submit   submit it and return        render   print the task
# status   the queue of jobs           logs     follow its log        delete   end it; its machines are deleted
#
#   --name NAME          of the job
#   --tpu NAME           v4-N and v5p-N count TensorCores, two a chip; v5e-N and v6e-N count chips
#   --gpus KIND:N        of each machine        --nodes N   machines with GPUs (1)
#   --spot               on spot machines       --infra gcp/us-central1   where (anywhere)
#   --env NAME           hand this variable of yours to the run, HF_TOKEN say; may be repeated
#   --dry-run            print every command, run none (the task is written all the same)
#
# Exit codes: 0 finished or submitted; 1 error, or the run failed; 2 usage.
set -euo pipefail
# shellcheck source=cloud/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

NAME='' FLAGS=() ENVIRONMENT=() REST=() SUBMITTED=no

main() {
  local command=${1:-}
  case $command in
    '') usage_error "no command: up, submit, render, status, logs, delete" ;;
    -h | --help) print_help "$0" && exit 0 ;;
    up | submit | render | status | logs | delete) shift ;;
    *) usage_error "$command: expected up, submit, render, status, logs or delete" ;;
  esac
  read_options "$@"
  [ "$command" = render ] || need sky
  "command_$command"
}

take_flag() {
  case $1 in
    --spot) FLAGS+=("$1") ;;
    *) return 1 ;;
  esac
}

take_value() {
  case $1 in
    --name) NAME=$2 ;;
    --tpu | --gpus | --nodes | --infra) FLAGS+=("$1=$2") ;;
    --env)
      [ -n "${!2:-}" ] || usage_error "--env $2: that variable is not set here"
      ENVIRONMENT+=(--env "$2") # its value is read by sky, and not printed
      ;;
    *) return 1 ;;
  esac
}

read_options() {
  read_words "$@"
  plain_name --name "$NAME"
}

write_task() {
  TASK=${XDG_CACHE_HOME:-$HOME/.cache}/jaxtune-cloud/$NAME/task.yaml
  mkdir -p "$(dirname "$TASK")"
  "$PYTHON" "$CLOUD/skypilot/render.py" --name="$NAME" ${FLAGS[@]+"${FLAGS[@]}"} ${REST[@]+"${REST[@]}"} >"$TASK" || exit
}

command_render() {
  write_task
  cat "$TASK"
}

command_submit() {
  local queue
  write_task
  queue=$(ask '' sky jobs queue --skip-finished --verbose) || fail "sky does not answer: sky check"
  if printf '%s\n' "$queue" | awk -v name="$NAME" '{ for (i = 1; i <= NF; i++) if ($i == name) found = 1 } END { exit !found }'; then
    fail "a job called $NAME is there already: delete it, or take another --name"
  fi
  SUBMITTED=yes
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  trap 'at_exit $?' EXIT
  launch --detach-run || undo
}

command_up() {
  command_submit
  run sky jobs logs --name "$NAME" --follow || fail "the run failed, or its log broke off: sky.sh status"
  SUBMITTED=no
  [ "$DRY_RUN" = yes ] || say "the training has finished; SkyPilot deletes its machines (its controller stops when idle)"
}

launch() { run sky jobs launch --name "$NAME" --yes "$@" ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"} "$TASK"; }

# A launch that failed may have left a job in the queue that would still find machines.
undo() {
  say "the job was not launched; cancelling what may have come of it"
  if retry cancel; then SUBMITTED=no; fi
  fail "the job was not launched (the lines above say why)"
}

cancel() {
  local output
  if output=$(run sky jobs cancel --name "$NAME" --yes 2>&1); then return; fi
  [[ $output != *"o running job found"* && $output != *"o in-progress"* ]] || return 0
  say "$output"
  return 1
}

at_exit() {
  local code=$1
  trap '' HUP INT TERM
  trap - EXIT
  if [ "$SUBMITTED" = yes ] && [ "$DRY_RUN" = no ]; then
    say "STILL THERE, AND BILLED WHILE IT RUNS: the managed job $NAME. It deletes its machines when it ends. To end it now:"
    say "  $(quoted sky jobs cancel --name "$NAME" --yes)"
  fi
  exit "$code"
}

command_status() { run sky jobs queue; }

command_logs() { run sky jobs logs --name "$NAME" --follow; }

command_delete() { retry cancel || fail "the job could not be ended: $(quoted sky jobs cancel --name "$NAME" --yes)"; }

main "$@"
