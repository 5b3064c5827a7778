#!/usr/bin/env bash
# jaxtune on GKE: a JobSet of TPU pods, or the same through XPK.
#
#   gke.sh up --name NAME --tpu v5p-32 --image IMAGE [CONFIG.yaml] [key=value ...]
#
# The same words fit all commands: change the first one.
#
# up       submit, then wait until the run has ended; preemptions are restarted by the cluster
# render   print the manifest                 submit   apply it and return
# status   the JobSet and its pods            logs     follow the log of the first pod
# delete   delete the JobSet and its ConfigMap
# pool     make the node pools: one for each slice; they are billed from then on
# pool-delete                                 delete them
# xpk      upload CONFIG beside `output` and hand the run to `xpk workload create`
# xpk-delete                                  delete that workload
#
#   --name NAME            of the JobSet, the node pools, the workload
#   --tpu NAME             v4-N and v5p-N count TensorCores, two a chip; v5e-N, v6e-N and tpu7x-N count chips
#   --image IMAGE          with jaxtune in it: ../docker
#   --slices N             so many slices as one run (1)
#   --spot                 on spot machines
#   --restarts N           after preemptions (20)          --grace SECONDS   from SIGTERM to SIGKILL (120)
#   --namespace N (default)   --queue LOCAL_QUEUE   --service-account NAME   --secret NAME
#   --local-disk FOLDER    of each machine, for checkpoint.local.path=FOLDER
#   --context CONTEXT      of kubectl
#   --poll SECONDS         between looks at the JobSet (30)
#   --delete-when-done     delete the JobSet whatever way `up` ends
#   --cluster, --location, --project     for pool, pool-delete, xpk and xpk-delete
#   --dry-run              print every command, run none (the manifest is written all the same)
#
# Exit codes: 0 finished; 1 error, or the run failed; 2 usage.
set -euo pipefail
# shellcheck source=cloud/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

NAME='' TPU='' IMAGE='' SLICES=1 SPOT=no RESTARTS=20 GRACE=120 NAMESPACE=default POLL=30 DELETE_WHEN_DONE=no
CLUSTER='' LOCATION='' PROJECT=${CLOUDSDK_CORE_PROJECT:-}
OPTIONAL=() REST=() KUBECTL=(kubectl)
SUBMITTED=no

main() {
  local command=${1:-}
  case $command in
    '') usage_error "no command: up, render, submit, status, logs, delete, pool, pool-delete, xpk, xpk-delete" ;;
    -h | --help) print_help "$0" && exit 0 ;;
    up | render | submit | status | logs | delete | pool | pool-delete | xpk | xpk-delete) shift ;;
    *) usage_error "$command: expected up, render, submit, status, logs, delete, pool, pool-delete, xpk or xpk-delete" ;;
  esac
  read_options "$@"
  case $command in
    pool* | xpk*)
      [ -n "$CLUSTER" ] || usage_error "--cluster is missing"
      [ -n "$LOCATION" ] || usage_error "--location is missing: the cluster's zone or region"
      [ -n "$PROJECT" ] || usage_error "--project is missing (or CLOUDSDK_CORE_PROJECT)"
      ;;
  esac
  case $command in pool* | xpk*) read_tpu_name "$TPU" "$SLICES" ;; esac
  case $command in xpk | render | up | submit) [ -n "$IMAGE" ] || usage_error "--image is missing; ../docker builds one" ;; esac
  case $command in
    up | submit | status | logs | delete) need kubectl ;;
    pool*) need gcloud ;;
    xpk) need xpk gcloud ;;
    xpk-delete) need xpk ;;
  esac
  "command_${command//-/_}"
}

take_flag() {
  case $1 in
    --spot) SPOT=yes ;;
    --delete-when-done) DELETE_WHEN_DONE=yes ;;
    *) return 1 ;;
  esac
}

take_value() {
  case $1 in
    --name) NAME=$2 ;;
    --tpu) TPU=$2 ;;
    --image) IMAGE=$2 ;;
    --slices) SLICES=$2 ;;
    --restarts) RESTARTS=$2 ;;
    --grace) GRACE=$2 ;;
    --namespace) NAMESPACE=$2 ;;
    --poll) POLL=$2 ;;
    --cluster) CLUSTER=$2 ;;
    --location) LOCATION=$2 ;;
    --project) PROJECT=$2 ;;
    --context) KUBECTL+=("--context=$2") ;;
    --queue | --service-account | --secret | --local-disk) OPTIONAL+=("$1=$2") ;;
    *) return 1 ;;
  esac
}

read_options() {
  read_words "$@"
  plain_name --name "$NAME"
  whole_number --slices "$SLICES"
  whole_number --restarts "$RESTARTS"
  whole_number --grace "$GRACE"
  whole_number --poll "$POLL"
  KUBECTL+=("--namespace=$NAMESPACE")
}

# ---- the JobSet

# Writes the manifest, and ends here with exit code 2 where flags or configuration are wrong.
write_manifest() {
  local spot=()
  [ -n "$TPU" ] || usage_error "--tpu is missing: a slice such as v5p-32, v5e-16 or v6e-64"
  if [ "$SPOT" = yes ]; then spot=(--spot); fi
  MANIFEST=${XDG_CACHE_HOME:-$HOME/.cache}/jaxtune-cloud/$NAME/jobset.yaml
  mkdir -p "$(dirname "$MANIFEST")"
  "$PYTHON" "$CLOUD/gke/render.py" --name="$NAME" --tpu="$TPU" --slices="$SLICES" --image="$IMAGE" \
    --namespace="$NAMESPACE" --restarts="$RESTARTS" --grace="$GRACE" ${spot[@]+"${spot[@]}"} \
    ${OPTIONAL[@]+"${OPTIONAL[@]}"} ${REST[@]+"${REST[@]}"} >"$MANIFEST" || exit
}

command_render() {
  write_manifest
  cat "$MANIFEST"
}

command_submit() {
  local existing
  write_manifest
  say "manifest: $MANIFEST"
  existing=$(ask '' "${KUBECTL[@]}" get jobset "$NAME" --ignore-not-found --output=name) ||
    fail "kubectl does not answer"
  [ -z "$existing" ] || fail "$NAME is there already: delete it, or take another --name (the run itself resumes by its output)"
  if ! retry run "${KUBECTL[@]}" apply --filename="$MANIFEST"; then
    retry delete_jobset || fail "the manifest was not accepted, and what came of it could not be deleted: $(quoted "${KUBECTL[@]}" delete "jobset/$NAME" "configmap/$NAME")"
    fail "the manifest was not accepted; nothing of it is left"
  fi
  SUBMITTED=yes
}

command_up() {
  local state restarts=0 shown=0 silent=0 answer
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  trap 'at_exit $?' EXIT
  command_submit
  while :; do
    if answer=$(ask 'Completed 0' "${KUBECTL[@]}" get jobset "$NAME" --output='jsonpath={.status.terminalState} {.status.restarts}'); then
      silent=0
      state=${answer% *} restarts=${answer##* }
    else
      silent=$((silent + 1)) state=''
      [ "$silent" -lt 10 ] || fail "kubectl has not answered 10 times"
    fi
    if [ "${restarts:-0}" != "$shown" ]; then
      shown=$restarts
      say "$(date +%T) started again, $restarts of at most $RESTARTS times"
    fi
    case $state in
      Completed) say "the run has finished" && return ;;
      Failed) fail "the run failed; its log: $(quoted "${KUBECTL[@]}" logs "$(first_pods)" --tail=100)" ;;
    esac
    sleep "$POLL"
  done
}

at_exit() {
  local code=$1
  trap '' HUP INT TERM
  trap - EXIT
  [ "$SUBMITTED" = yes ] || exit "$code"
  if [ "$DELETE_WHEN_DONE" = yes ]; then
    if retry delete_jobset; then SUBMITTED=no; else code=$((code ? code : 1)); fi
  fi
  if [ "$DRY_RUN" = no ]; then
    if [ "$SUBMITTED" = yes ]; then
      say "STILL THERE: JobSet $NAME in namespace $NAMESPACE. To delete it (a run under way saves first):"
      say "  $(quoted "${KUBECTL[@]}" delete "jobset/$NAME" "configmap/$NAME" --ignore-not-found)"
    fi
    say "Nodes are billed as long as their node pool holds them, with or without a JobSet: gke.sh pool-delete, or a pool that scales to 0."
  fi
  exit "$code"
}

first_pods() { printf -- '--selector=jobset.sigs.k8s.io/jobset-name=%s,batch.kubernetes.io/job-completion-index=0' "$NAME"; }

delete_jobset() { run "${KUBECTL[@]}" delete "jobset/$NAME" "configmap/$NAME" --ignore-not-found; }

command_status() {
  run "${KUBECTL[@]}" get jobset "$NAME"
  run "${KUBECTL[@]}" get pods --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --output=wide
}

command_logs() { run "${KUBECTL[@]}" logs "$(first_pods)" --follow --tail=100 --prefix; }

command_delete() { retry delete_jobset || fail "JobSet $NAME could not be deleted"; }

# ---- node pools

pools() {
  local i
  for ((i = 0; i < SLICES; i++)); do echo "$NAME-$i"; done
}

command_pool() {
  local pool made=() flags=(--machine-type="$TPU_GKE_MACHINE" --num-nodes="$TPU_HOSTS")
  if [ "$TPU_HOSTS" -gt 1 ]; then flags+=(--tpu-topology="$TPU_SHAPE"); fi
  if [ "$SPOT" = yes ]; then flags+=(--spot); fi
  say "$TPU_DESCRIPTION"
  for pool in $(pools); do
    if run_heard gcloud container node-pools create "$pool" --cluster="$CLUSTER" --location="$LOCATION" \
      --project="$PROJECT" --quiet "${flags[@]}"; then
      made+=("$pool")
      continue
    fi
    # It may be half there all the same; one that was there before is not ours to delete.
    [[ $HEARD == *"lready exist"* ]] || made+=("$pool")
    say "$pool could not be made (the lines above say why); deleting what was"
    delete_pools ${made[@]+"${made[@]}"}
    fail "no node pools were made"
  done
  [ "$DRY_RUN" = yes ] || say "BILLED from now on: ${made[*]}. gke.sh pool-delete with the same words ends it."
}

command_pool_delete() {
  # shellcheck disable=SC2046  # names without spaces
  delete_pools $(pools)
}

delete_pools() {
  local pool left=()
  for pool in "$@"; do
    retry delete_pool "$pool" || left+=("$pool")
  done
  [ ${#left[@]} -gt 0 ] || return 0
  say "STILL BILLED: node pools ${left[*]}. To delete them:"
  for pool in "${left[@]}"; do say "  $(quoted gcloud container node-pools delete "$pool" "${POOL_WHERE[@]}")"; done
  exit 1
}

delete_pool() {
  local output
  POOL_WHERE=(--cluster="$CLUSTER" --location="$LOCATION" --project="$PROJECT" --quiet)
  if output=$(run gcloud container node-pools delete "$1" "${POOL_WHERE[@]}" 2>&1); then return; fi
  [[ $output != *NOT_FOUND* && $output != *"not found"* && $output != *"Not found"* ]] || return 0
  say "$output"
  return 1
}

# ---- XPK

command_xpk() {
  local words=() spot=() place
  split_words ${REST[@]+"${REST[@]}"}
  need_bucket
  if [ -n "$CONFIG" ]; then
    place=${OUTPUT%/}.yaml # beside the folder: XPK has no ConfigMap, and jaxtune reads a URL
    retry run gcloud storage cp "$CONFIG" "$place" || fail "$CONFIG could not be copied to $place"
    words=("$place")
  fi
  words+=(${WORDS[@]+"${WORDS[@]}"})
  if [ "$SPOT" = yes ]; then spot=(--spot); fi
  # `exec`: XPK sends SIGTERM to the shell that runs the command. XPK restarts on 143, not on 1 and 2.
  run_heard xpk workload create --workload="$NAME" --cluster="$CLUSTER" --zone="$LOCATION" --project="$PROJECT" \
    --tpu-type="$(xpk_name)" --num-slices="$SLICES" --docker-image="$IMAGE" --max-restarts="$RESTARTS" \
    --termination-grace-period-seconds="$GRACE" ${spot[@]+"${spot[@]}"} \
    --command="exec $(quoted python -m jaxtune.train "${words[@]}")" && return
  [[ $HEARD != *"lready exist"* ]] || fail "$NAME is there already: xpk-delete it, or take another --name"
  say "the workload was not made; deleting what may have come of it"
  command_xpk_delete
  exit 1
}

# XPK's tpu7x-N counts TensorCores, ours chips: a shape says the same in both.
xpk_name() { echo "${TPU_ACCELERATOR_TYPE%-*}-$TPU_SHAPE"; }

command_xpk_delete() {
  retry run xpk workload delete --workload="$NAME" --cluster="$CLUSTER" --zone="$LOCATION" --project="$PROJECT" --force ||
    fail "workload $NAME could not be deleted; look for it with: $(quoted xpk workload list --cluster="$CLUSTER" --zone="$LOCATION" --project="$PROJECT")"
}

main "$@"
