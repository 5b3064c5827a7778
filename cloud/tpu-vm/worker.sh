#!/usr/bin/env bash
# What tpu-vm.sh has every machine of a TPU do; it lies in ~/jaxtune-job there, beside the configuration and the log.
#
#   worker.sh setup [PACKAGE]   makes venv/ with jaxtune: of source.tar.gz, or what pip calls PACKAGE
#   worker.sh start WORD...     starts python -m jaxtune.train WORD... so that it outlives the connection
#   worker.sh report LINE       prints the log from that line on, then `jaxtune-job: STATE CODE LINES`
#   worker.sh stop              sends SIGTERM (the run saves and ends), SIGKILL after 5 minutes
#   worker.sh logs              follows the log
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# The files of a training: `supervisor` and `pid`, its two processes while it runs; `code`, how it ended; `log`.
alive() { [ -s supervisor ] && kill -0 "$(cat supervisor)" 2>/dev/null; }

setup() {
  local package=${1:-}
  PATH=$HOME/.local/bin:$PATH
  # The images have Python 3.10 and jaxtune needs 3.11: uv brings one of its own.
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  [ -x venv/bin/python ] || uv venv --quiet --python 3.12 venv
  if [ -z "$package" ]; then
    rm -rf source
    mkdir source
    tar -C source -xzf source.tar.gz
    package='./source[tpu]'
  fi
  uv pip install --quiet --python venv/bin/python --reinstall-package jaxtune "$package"
}

start() {
  if alive; then
    echo "running already, as process $(cat supervisor)" >&2
    exit 3
  fi
  rm -f code pid
  echo "--- $(date -u +%FT%TZ) python -m jaxtune.train $*" >>log
  nohup setsid bash "$PWD/worker.sh" supervise "$@" >>log 2>&1 </dev/null &
  echo $! >supervisor
  for _ in $(seq 50); do
    if [ -s pid ] || [ -s code ]; then return; fi
    sleep 0.1
  done
  echo "the training did not start" >&2
  exit 1
}

# Runs the training in the foreground of a shell of its own, whose last act is to note the exit code.
supervise() {
  local code=0
  trap : TERM INT HUP # when the machine shuts down, the training gets its own SIGTERM
  if [ -f env ]; then
    set -a
    # shellcheck disable=SC1091  # written by tpu-vm.sh
    . ./env
    set +a
  fi
  # shellcheck disable=SC2016  # that shell's own process
  bash -c 'echo $$ >pid && exec "$@"' - venv/bin/python -m jaxtune.train "$@" || code=$?
  echo "$code" >code.new
  mv code.new code
  rm supervisor
}

report() {
  local state=none code=- lines=0
  # Before the log, so that no line comes after the state was read; in this order, for a run may end meanwhile.
  if alive; then
    state=running
  elif [ -s code ]; then
    state=ended code=$(cat code)
  fi
  if [ -f log ]; then
    lines=$(wc -l <log)
    sed -n "$1,${lines}p" log
  fi
  echo "jaxtune-job: $state $code $lines"
}

stop() {
  alive || return 0
  kill -TERM "$(cat pid)" 2>/dev/null || true
  for _ in $(seq 300); do
    alive || return 0
    sleep 1
  done
  kill -KILL "$(cat pid)" || true
}

case ${1:-} in
  setup | start | supervise | report | stop) "$@" ;;
  logs) exec tail -n 100 -F log ;;
  *)
    echo "usage: worker.sh setup|start|report|stop|logs" >&2
    exit 2
    ;;
esac
