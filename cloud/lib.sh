# shellcheck shell=bash
# What the scripts of this folder share. Sourced; does nothing by itself.
#
# Commands that change something go through `run`, questions through `ask`. Under --dry-run both print the command on
# standard output instead, as a shell would read it, and nothing else is printed there. Messages go to standard error.

DRY_RUN=no
ATTEMPTS=5                             # of a command that may fail for a moment
PAUSE=${JAXTUNE_CLOUD_PAUSE:-10}       # seconds before the second attempt; doubles from there
PYTHON=${PYTHON:-python3}
CLOUD=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec 3>&1 # where dry runs print, also inside $(...)

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }
usage_error() { say "error: $* (--help says more)"; exit 2; }

# The text at the top of a script, from its second line to the first line that is no comment.
print_help() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"; }

# quoted WORD...: one line that a shell reads back as these words.
quoted() {
  local word line=
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'" ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

run() {
  if [ "$DRY_RUN" = yes ]; then quoted "$@" >&3; else "$@"; fi
}

# run_heard COMMAND...: runs it, shows what it says, and keeps that in HEARD.
# shellcheck disable=SC2034  # it is read where this file is sourced
run_heard() {
  HEARD=
  if [ "$DRY_RUN" = yes ]; then run "$@"; else HEARD=$("$@" 2>&1 | tee /dev/stderr); fi
}

# ask ANSWER COMMAND...: what the command prints; under --dry-run ANSWER, that of a run in which all goes well.
ask() {
  local answer=$1
  shift
  if [ "$DRY_RUN" = yes ]; then
    quoted "$@" >&3
    printf '%s\n' "$answer"
  else
    "$@"
  fi
}

# retry COMMAND...: again with pauses that double, ATTEMPTS times in all; returns the last exit code.
retry() {
  local attempt code pause=$PAUSE
  for ((attempt = 1; ; attempt++)); do
    code=0
    "$@" || code=$?
    if [ "$code" -eq 0 ] || [ "$attempt" -ge "$ATTEMPTS" ]; then return "$code"; fi
    say "failed with exit code $code; again in ${pause}s (attempt $attempt of $ATTEMPTS)"
    sleep "$pause"
    pause=$((pause * 2))
  done
}

# need PROGRAM...: ends here, and says so, where a program is missing. Dry runs need none of them.
need() {
  local program
  for program in "$@"; do
    [ "$DRY_RUN" = yes ] || command -v "$program" >/dev/null || fail "$program is not installed, or not in PATH"
  done
}

# value_of OPTION WORDS_LEFT [VALUE]: ends here where an option's value is missing.
value_of() {
  if [ "$2" -lt 2 ] || [ -z "$3" ]; then usage_error "$1 needs a value"; fi
}

# read_words WORD...: the script's own take_flag and take_value hear its options, each returning 1 for one that it has
# not; what is no option goes to REST.
# shellcheck disable=SC2034  # it is read where this file is sourced
read_words() {
  while [ $# -gt 0 ]; do
    case $1 in
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case $1 in
      --dry-run) DRY_RUN=yes && shift && continue ;;
      --*) if take_flag "$1"; then shift && continue; fi ;;
      *) REST+=("$1") && shift && continue ;;
    esac
    value_of "$1" $# "${2:-}"
    take_value "$1" "$2" || usage_error "$1 is no option"
    shift 2
  done
}

whole_number() {
  case $2 in '' | *[!0-9]*) usage_error "$1: found '$2'; expected a whole number" ;; esac
}

# A name that becomes the name of machines, pods, jobs: what all of them allow.
plain_name() {
  [ -n "$2" ] || usage_error "$1 is missing"
  [[ $2 =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    usage_error "$1: found '$2'; expected at most 40 of a-z, 0-9 and -, a letter first, no - at the end"
}

# read_tpu_name NAME SLICES: sets TPU_HOSTS, TPU_ACCELERATOR_TYPE and the others that tpu_names.py prints.
read_tpu_name() {
  local assignments code=0
  [ -n "$1" ] || usage_error "--tpu is missing: a slice such as v5p-16, v5e-8 or v6e-64"
  assignments=$("$PYTHON" "$CLOUD/tpu_names.py" "$1" "$2") || code=$?
  [ "$code" -eq 0 ] || exit "$code"
  eval "$assignments"
}

# split_words WORD...: sets CONFIG to the configuration file ('' where there is none), WORDS to the rest, key=value, and
# OUTPUT to where the run writes. Ends here where the file does not exist or the configuration is wrong.
split_words() {
  local word output code=0
  CONFIG=
  WORDS=()
  for word in "$@"; do
    case $word in
      *=*) WORDS+=("$word") ;;
      -*) usage_error "$word is no option here" ;;
      *)
        [ -z "$CONFIG" ] || usage_error "$word: expected key=value, for $CONFIG is the configuration already"
        CONFIG=$word
        ;;
    esac
  done
  if [ "$#" -eq 0 ]; then usage_error "nothing to train: expected CONFIG.yaml, key=value words, or both"; fi
  [ -z "$CONFIG" ] || [ -f "$CONFIG" ] || usage_error "$CONFIG: no such file"
  output=$("$PYTHON" "$CLOUD/check_config.py" "$@") || code=$?
  case $code in
    0) ;;
    3) # as well as the shell can
      [ -z "$CONFIG" ] || output=$(sed -n "s/^output: *//p" "$CONFIG" | head -n 1 | sed "s/ *#.*//; s/[\"']//g")
      for word in "$@"; do
        case $word in output=*) output=${word#output=} ;; esac
      done
      ;;
    *) exit 2 ;;
  esac
  OUTPUT=$output
}

# A machine that goes takes its disk along; what a run has to outlive it lies in a bucket.
need_bucket() {
  case $OUTPUT in
    gs://* | s3://*) ;;
    '') usage_error "output is missing: a bucket, output=gs://BUCKET/runs/NAME" ;;
    *) usage_error "output: found '$OUTPUT'; expected a bucket, output=gs://BUCKET/runs/NAME: what lies on these machines goes with them" ;;
  esac
}
