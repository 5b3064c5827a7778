#!/usr/bin/env bash
# jaxtune on TPU VMs, through queued resources.
#
#   tpu-vm.sh up --name NAME --tpu v5p-16 --zone ZONE --project PROJECT [CONFIG.yaml] [key=value ...]
#
# The same words fit all commands: change the first one.
#
# up       create, setup, run; after a preemption delete, create again and go on, until the run has ended
# resume   the same on what may be there already: follows a run, starts it again, or makes the TPU anew
# create   ask for the TPU and wait until all its machines are there
# setup    copy this checkout and the configuration to every machine and install them
# run      start the training on every machine and follow it (Ctrl-C leaves it running)
# logs     follow the log of the first machine        status   state of the TPU and of the training
# stop     have the training save and end             delete   delete the TPU and see that it is gone
#
#   --name NAME          the queued resource and its nodes
#   --tpu NAME           v4-N and v5p-N count TensorCores, two a chip; v5e-N and v6e-N count chips
#   --zone, --project    or CLOUDSDK_COMPUTE_ZONE, CLOUDSDK_CORE_PROJECT
#   --slices N           so many slices as one run (1)
#   --spot, --reserved   which capacity (on demand)
#   --wait SECONDS       give up, and delete the request, when it takes longer (21600)
#   --restarts N         how often a run that was preempted or killed is started again (20)
#   --poll SECONDS       between looks at the TPU and the log (30)
#   --delete-when-done   delete the TPU whatever way this script ends
#   --package SPEC       install this with pip instead of this checkout: "jaxtune[tpu]", git+https://...
#   --env NAME           hand this variable of yours to the run, HF_TOKEN say; may be repeated
#   --gcloud FLAG        one more flag for `create`, --gcloud=--network=NET say; may be repeated
#   --runtime VERSION    another image of the machines
#   --dry-run            print every command, run none
#
# Exit codes: 0 finished; 1 error; 2 usage; otherwise that of the training. Nothing stays behind without a word: the last
# lines say what is still billed, and the command that deletes it.
set -euo pipefail
# shellcheck source=cloud/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
# shellcheck source=cloud/tpu-vm/request.sh
. "$CLOUD/tpu-vm/request.sh"

NAME='' TPU='' SLICES=1 WAIT=21600 RESTARTS=20 POLL=30 RUNTIME='' PACKAGE='' DELETE_WHEN_DONE=no
ZONE=${CLOUDSDK_COMPUTE_ZONE:-} PROJECT=${CLOUDSDK_CORE_PROJECT:-}
CREATE_FLAGS=() ENVIRONMENT=() REST=()
ASSUMED=ACTIVE # state of the request, in dry runs
BILLED=no      # whether something may be there that costs money
STARTED=no     # whether a training is under way that this script has started or follows
RESTARTED=0
SEEN=0         # lines of the log that were shown
OUTCOME=''     # of a run that was followed: finished, saved, lost, killed N, failed N

main() {
  local command=${1:-} nodes
  case $command in
    '') usage_error "no command: up, resume, create, setup, run, logs, status, stop, delete" ;;
    -h | --help) print_help "$0" && exit 0 ;;
    up | resume | create | setup | run | logs | status | stop | delete) shift ;;
    *) usage_error "$command: expected up, resume, create, setup, run, logs, status, stop or delete" ;;
  esac
  read_options "$@"
  case $command in up | resume | create) read_tpu ;; esac
  case $command in
    up | resume | setup | run)
      split_words ${REST[@]+"${REST[@]}"}
      need_bucket
      ;;
  esac
  need gcloud
  [ -z "${TPU_DESCRIPTION:-}" ] || say "$TPU_DESCRIPTION"
  QUEUED=(gcloud compute tpus queued-resources)
  WHERE=(--zone="$ZONE" --project="$PROJECT" --quiet)
  DESCRIBE=("${QUEUED[@]}" describe "$NAME" "${WHERE[@]}" --format='value(state.state)')
  DELETE=("${QUEUED[@]}" delete "$NAME" "${WHERE[@]}" --force)
  nodes=$NAME
  if [ "$SLICES" -gt 1 ]; then nodes="$NAME-(0$(for ((i = 1; i < SLICES; i++)); do printf '|%s' "$i"; done))"; fi
  NODES=(gcloud compute tpus tpu-vm list "${WHERE[@]}" --filter="name~/$nodes\$")
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  trap 'at_exit $?' EXIT
  case $command in up | resume | setup) stage_files ;; esac
  "command_$command"
}

take_flag() {
  case $1 in
    --spot | --reserved) CREATE_FLAGS+=("$1") ;;
    --delete-when-done) DELETE_WHEN_DONE=yes ;;
    *) return 1 ;;
  esac
}

take_value() {
  case $1 in
    --name) NAME=$2 ;;
    --tpu) TPU=$2 ;;
    --zone) ZONE=$2 ;;
    --project) PROJECT=$2 ;;
    --slices) SLICES=$2 ;;
    --wait) WAIT=$2 ;;
    --restarts) RESTARTS=$2 ;;
    --poll) POLL=$2 ;;
    --package) PACKAGE=$2 ;;
    --runtime) RUNTIME=$2 ;;
    --env) ENVIRONMENT+=("$2") ;;
    --gcloud) CREATE_FLAGS+=("$2") ;;
    *) return 1 ;;
  esac
}

read_options() {
  read_words "$@"
  plain_name --name "$NAME"
  [ -n "$ZONE" ] || usage_error "--zone is missing (or CLOUDSDK_COMPUTE_ZONE)"
  [ -n "$PROJECT" ] || usage_error "--project is missing (or CLOUDSDK_CORE_PROJECT)"
  whole_number --slices "$SLICES"
  whole_number --wait "$WAIT"
  whole_number --restarts "$RESTARTS"
  whole_number --poll "$POLL"
  local variable
  for variable in ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"}; do
    [ -n "${!variable:-}" ] || usage_error "--env $variable: that variable is not set here"
  done
}

read_tpu() {
  read_tpu_name "$TPU" "$SLICES"
  RUNTIME=${RUNTIME:-$TPU_RUNTIME}
  [ -n "$RUNTIME" ] || usage_error "--tpu: $TPU_KIND is not rented as a TPU VM; ../gke takes it"
  [ "$TPU_IS_USUAL_SHAPE" = yes ] || usage_error "--tpu: $TPU: a TPU VM of $TPU_ACCELERATOR_TYPE has another shape; ../gke takes any"
}

# ---- commands, in the order of a run

command_up() {
  refuse_if_there
  create_until_ready
  set_up_and_start
  follow_to_the_end
}

command_resume() {
  local state
  BILLED=yes
  state=$(state_of_request)
  case $state in
    UNKNOWN) fail "cannot see whether $NAME is there: $(quoted "${DESCRIBE[@]}")" ;;
    GONE | FAILED | SUSPENDING | SUSPENDED | DELETING) recreate ;;
    *) wait_until_ready || recreate ;;
  esac
  case $(first_machine report 1000000000 2>/dev/null || true) in
    *"jaxtune-job: running"*) say "it is running; following it" ;;
    *) set_up_and_start ;;
  esac
  follow_to_the_end
}

command_create() {
  refuse_if_there
  provision || fail "the TPU was taken away before it was ready"
}

command_setup() { BILLED=yes && set_up; }

command_run() {
  BILLED=yes
  start_training
  follow
  end_as_told
}

command_logs() { run "${QUEUED[@]}" ssh "$NAME" "${WHERE[@]}" --node=0 --worker=0 --command="bash jaxtune-job/worker.sh logs"; }

command_status() {
  say "queued resource: $(state_of_request)"
  say "nodes: $(node_states | tr '\n' ' ')"
  say "training: $(first_machine report 1000000000 2>/dev/null || echo 'no answer')"
}

command_stop() { BILLED=yes && every_machine stop; }

command_delete() { BILLED=yes && delete_all; }

# ---- the training

first_machine() {
  local command=$1
  shift
  ask 'jaxtune-job: ended 0 0' "${QUEUED[@]}" ssh "$NAME" "${WHERE[@]}" --node=0 --worker=0 \
    --command="$(quoted bash jaxtune-job/worker.sh "$command" "$@")" </dev/null
}

every_machine() {
  run "${QUEUED[@]}" ssh "$NAME" "${WHERE[@]}" --node=all --worker=all \
    --command="$(quoted bash jaxtune-job/worker.sh "$@")" </dev/null
}

# Gathers what every machine gets, before anything is asked for that costs money.
stage_files() {
  local variable
  STAGE=${XDG_CACHE_HOME:-$HOME/.cache}/jaxtune-cloud/$NAME/jaxtune-job
  [ "$DRY_RUN" = no ] || return 0
  rm -rf "$STAGE"
  mkdir -p "$STAGE"
  chmod 700 "$STAGE"
  cp "$CLOUD/tpu-vm/worker.sh" "$STAGE/worker.sh"
  [ -z "$CONFIG" ] || cp "$CONFIG" "$STAGE/config.yaml"
  [ -n "$PACKAGE" ] ||
    tar -C "$CLOUD/.." --exclude=__pycache__ -czf "$STAGE/source.tar.gz" jaxtune pyproject.toml README.md LICENSE
  for variable in ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"}; do
    printf "%s='%s'\n" "$variable" "$(printf '%s' "${!variable}" | sed "s/'/'\\\\''/g")" >>"$STAGE/env"
  done
}

# Copies the files to every machine, and installs. The first connections to new machines often fail.
set_up() {
  retry run "${QUEUED[@]}" scp --recurse "$STAGE" "$NAME:" "${WHERE[@]}" --node=all --worker=all || return
  retry every_machine setup ${PACKAGE:+"$PACKAGE"}
}

start_training() {
  STARTED=yes
  every_machine start ${CONFIG:+config.yaml} ${WORDS[@]+"${WORDS[@]}"}
}

# set_up_and_start: a machine that does not come through has perhaps been preempted; then another TPU, so many times.
set_up_and_start() {
  until set_up && start_training; do
    was_taken_away || fail "a machine could not be set up, or the training not be started there"
    count_restart "the TPU was taken away during set-up"
    recreate
  done
}

# follow: shows the log as it grows until the run has ended or is lost, and sets OUTCOME.
follow() {
  local report state code lines silent=0
  STARTED=yes
  while :; do
    if report=$(first_machine report $((SEEN + 1)) 2>/dev/null) && [[ ${report##*$'\n'} == jaxtune-job:* ]]; then
      silent=0
      read -r _ state code lines <<<"${report##*$'\n'}"
      if [[ $report == *$'\n'* ]]; then printf '%s\n' "${report%$'\n'*}"; fi
      SEEN=$lines
      case $state in
        running) ;;
        ended) told_by_code "$code" && return ;;
        *) told_by_code 137 && return ;; # the machine has been started anew
      esac
    else
      silent=$((silent + 1))
      if was_taken_away || [ "$silent" -ge 10 ]; then
        OUTCOME=lost
        return
      fi
    fi
    sleep "$POLL"
  done
}

# A run whose machines vanish one after the other ends with an error too: that is a preemption, not a failure.
told_by_code() {
  case $1 in
    0) OUTCOME=finished ;;
    143) OUTCOME=saved ;;
    1 | 2 | 130) OUTCOME="failed $1" ;;
    *) OUTCOME="killed $1" ;;
  esac
  STARTED=no
  [ "$1" -ne 0 ] || return 0
  [ "$1" -eq 143 ] || sleep "$POLL" # until the state of the TPU tells
  if was_taken_away; then OUTCOME=lost; fi
}

# follow_to_the_end: follows, and starts again what was preempted or killed, RESTARTS times in all.
follow_to_the_end() {
  while :; do
    follow
    case $OUTCOME in
      saved | killed*)
        count_restart "the training ended: $OUTCOME"
        start_again
        ;;
      lost)
        count_restart "the TPU was taken away"
        recreate
        set_up_and_start
        ;;
      *) break ;;
    esac
  done
  end_as_told
}

# A machine that is being preempted has its run save and end before the state of the TPU tells of it.
start_again() {
  local attempt
  for ((attempt = 1; attempt <= 10; attempt++)); do
    every_machine stop || true # some may still wait for one that was killed, or have started without the others
    ! start_training || return 0
    if was_taken_away; then
      recreate
      set_up_and_start
      return
    fi
    sleep "$POLL"
  done
  fail "the training could not be started again"
}

count_restart() {
  say "$1"
  [ "$RESTARTED" -lt "$RESTARTS" ] || fail "started again $RESTARTS times; that is enough (--restarts)"
  RESTARTED=$((RESTARTED + 1))
  say "going on with the same command, start $RESTARTED of at most $RESTARTS"
}

end_as_told() {
  case $OUTCOME in
    finished)
      [ "$DRY_RUN" = no ] || say "nothing was run; the training would write to $OUTPUT"
      [ "$DRY_RUN" = yes ] || say "the training has finished: $OUTPUT"
      ;;
    saved) say "the training was stopped, and has saved" && exit 143 ;;
    lost) fail "the TPU was taken away" ;;
    *) say "error: the training ended with exit code ${OUTCOME#* }; its log is above" && exit "${OUTCOME#* }" ;;
  esac
}

# Whatever way this script ends: nothing is left that costs money without these lines.
at_exit() {
  local code=$1
  trap '' HUP INT TERM
  trap - EXIT
  [ -z "${STAGE:-}" ] || rm -rf "$STAGE"
  if [ "$BILLED" = yes ] && [ "$DELETE_WHEN_DONE" = yes ]; then
    say "deleting $NAME (--delete-when-done)"
    [ "$STARTED" = no ] || every_machine stop >/dev/null 2>&1 || true
    if (delete_all); then BILLED=no; else code=$((code ? code : 1)); fi
  fi
  if [ "$BILLED" = yes ] && [ "$DRY_RUN" = no ]; then
    say "STILL BILLED: $NAME, $SLICES x ${TPU:-TPU} in $ZONE of project $PROJECT. To delete it:"
    say "  $(quoted "${DELETE[@]}")"
    say "and to see that nothing is left:"
    say "  $(quoted "${NODES[@]}")"
    [ "$STARTED" = no ] || say "The training goes on there; the same words after 'resume' follow it."
  fi
  exit "$code"
}

main "$@"
