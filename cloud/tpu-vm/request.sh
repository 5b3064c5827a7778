# shellcheck shell=bash
# The queued resource of tpu-vm.sh, which sources this: asked for, waited for, looked at, deleted. Its words (NAME, WHERE,
# DESCRIBE, DELETE, NODES ...) are set there.
# shellcheck disable=SC2034,SC2153

HALF_READY=1800 # seconds that a TPU may be billed with some of its slices missing

refuse_if_there() {
  case $(ASSUMED=GONE state_of_request) in
    GONE) ;;
    UNKNOWN) fail "gcloud does not answer: $(quoted "${DESCRIBE[@]}")" ;;
    *) fail "$NAME is there already: use resume, delete, or another --name" ;;
  esac
}

# provision: creates the TPU and waits for it; returns 1 where it was taken away meanwhile (and is deleted).
provision() {
  local nodes=(--node-id="$NAME") output attempt pause=$PAUSE
  if [ "$SLICES" -gt 1 ]; then nodes=(--node-count="$SLICES" --node-prefix="$NAME"); fi
  for ((attempt = 1; ; attempt++)); do
    BILLED=yes
    # valid-until: a request that is forgotten, this script's machine being gone, never turns into a bill later.
    if output=$(run "${QUEUED[@]}" create "$NAME" "${WHERE[@]}" --accelerator-type="$TPU_ACCELERATOR_TYPE" \
      --runtime-version="$RUNTIME" "${nodes[@]}" --valid-until-duration="${WAIT}s" \
      ${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"} 2>&1); then
      break
    fi
    say "$output"
    # It failed, and may all the same have left a request or nodes behind.
    case $(state_of_request) in
      GONE) BILLED=no ;;
      ACTIVE | PROVISIONING | CREATING | ACCEPTED | WAITING_FOR_RESOURCES) break ;;
      UNKNOWN) fail "the request failed, and gcloud does not tell whether it left something behind" ;;
      *) delete_all ;;
    esac
    case $output in
      *[Qq]uota* | *RESOURCE_EXHAUSTED*) fail "no quota for $TPU_ACCELERATOR_TYPE in $ZONE (spot, on demand and reserved have quotas of their own)" ;;
      *PERMISSION_DENIED* | *INVALID_ARGUMENT* | *"invalid choice"* | *unrecognized*) fail "gcloud refused the request" ;;
    esac
    [ "$attempt" -lt "$ATTEMPTS" ] || fail "the TPU could not be requested, $ATTEMPTS times"
    sleep "$pause"
    pause=$((pause * 2))
  done
  wait_until_ready
}

# wait_until_ready: returns 0 when every slice is there, 1 when the TPU was taken away (and has been deleted).
wait_until_ready() {
  local state nodes ready since=$SECONDS active='' silent=0
  while :; do
    state=$(state_of_request)
    silent=$((silent + 1))
    [ "$state" = UNKNOWN ] || silent=0
    [ "$silent" -lt 10 ] || fail "gcloud has not answered 10 times: $(quoted "${DESCRIBE[@]}")"
    if [ "$state" = ACTIVE ]; then
      nodes=$(node_states)
      ready=$(printf '%s\n' "$nodes" | grep -c '^READY$' || true)
      [ "$ready" -ne "$SLICES" ] || return 0
      active=${active:-$SECONDS}
      state="ACTIVE, but $ready of $SLICES slices are ready"
      if is_gone "$nodes" || [ $((SECONDS - active)) -ge "$HALF_READY" ]; then
        say "$state"
        state=SUSPENDED
      fi
    fi
    case $state in
      FAILED)
        say "$("${QUEUED[@]}" describe "$NAME" "${WHERE[@]}" --format='value(state)' 2>&1 || true)"
        delete_all
        fail "the request failed (gcloud's words are above); it is deleted"
        ;;
      SUSPENDING | SUSPENDED | DELETING | GONE)
        say "the TPU was taken away: $state"
        delete_all
        return 1
        ;;
    esac
    if [ $((SECONDS - since)) -ge "$WAIT" ]; then
      delete_all
      fail "after ${WAIT}s the TPU was still $state; the request is deleted"
    fi
    say "$(date +%T) $NAME: $state"
    sleep "$POLL"
  done
}

recreate() {
  SEEN=0
  [ "$(state_of_request)" = GONE ] || delete_all
  create_until_ready
}

create_until_ready() {
  until provision; do count_restart "it was taken away before it was ready"; done
}

# The state of the queued resource, GONE where there is none, UNKNOWN where gcloud fails otherwise.
state_of_request() {
  local output
  if output=$(ask "$ASSUMED" "${DESCRIBE[@]}" 2>&1); then
    printf '%s\n' "${output##*$'\n'}"
  elif [[ $output == *NOT_FOUND* || $output == *"not found"* ]]; then
    echo GONE
  else
    say "$output"
    echo UNKNOWN
  fi
}

# The state of every node of this queued resource, one a line; UNKNOWN where gcloud fails.
node_states() {
  ask "$(for ((i = 0; i < SLICES; i++)); do echo READY; done)" "${NODES[@]}" --format='value(state)' || echo UNKNOWN
}

# is_gone STATES: whether a node was taken away, or is missing beside others.
is_gone() {
  local there
  there=$(printf '%s' "$1" | grep -c .) || return 1
  [[ $1 != *UNKNOWN* ]] || return 1
  [ "$there" -ge "$SLICES" ] || return 0
  printf '%s\n' "$1" | grep -q -E '^(PREEMPTED|TERMINATED|STOPPED|STOPPING|DELETING|HIDDEN)$'
}

# Deletes the queued resource with its nodes, and nodes that are left; ends here where it cannot.
delete_all() {
  local left
  retry delete_request || fail "$NAME could not be deleted"
  left=$(ask '' "${NODES[@]}" --format='value(name)') || fail "cannot see whether nodes of $NAME are left"
  for left in $left; do
    say "$left was left behind"
    retry run gcloud compute tpus tpu-vm delete "${left##*/}" "${WHERE[@]}" || fail "$left could not be deleted"
  done
  [ "$DRY_RUN" = yes ] || say "$NAME is deleted"
  BILLED=no
  STARTED=no
}

delete_request() { run "${DELETE[@]}" || [ "$(state_of_request)" = GONE ]; }

# Whether the TPU is no longer there as a whole; not so where gcloud does not say.
was_taken_away() {
  local state
  state=$(state_of_request)
  case $state in
    ACTIVE) is_gone "$(node_states)" ;;
    UNKNOWN) return 1 ;;
    *) return 0 ;;
  esac
}
