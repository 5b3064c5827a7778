#!/usr/bin/env bash
# The batch script that slurm.sh submits: one task for each GPU, and the job back into the queue after a preemption.
#
#   job.sh CLOUD RESTARTS PYTHON WORD...
#
# Which signal comes to whom decides what happens: --signal=TERM@N comes to the tasks alone, N seconds before the time
# limit. They save and end with 143, and the job is queued again here. Where SLURM itself ends the job (scancel, or
# preemption) this shell hears of it too: a cancelled job must not come back, and a preempted one SLURM queues again.
set -uo pipefail
# shellcheck source=cloud/lib.sh
. "$1/lib.sh"
restarts=$2 python=$3
shift 3

ended_by_slurm=no
trap 'ended_by_slurm=yes' TERM
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

say "--- $(date -u +%FT%TZ) start $((${SLURM_RESTART_COUNT:-0} + 1)) of job ${SLURM_JOB_ID:?not in a job} on ${SLURM_JOB_NODELIST:-?}"
code=0
# Tasks that end first must not take the others along: those may be saving still.
srun --kill-on-bad-exit=0 "$python" -m jaxtune.train "$@" || code=$?

case $code in
  0) say "the training has finished" && exit 0 ;;
  1 | 2 | 130) say "error: the training ended with exit code $code, which comes again; not queued again" && exit "$code" ;;
esac
if [ "$ended_by_slurm" = yes ]; then
  say "ended by SLURM (exit code $code)"
elif [ "${SLURM_RESTART_COUNT:-0}" -ge "$restarts" ]; then
  say "error: exit code $code; queued again $restarts times, that is enough (--restarts)"
elif retry scontrol requeue "$SLURM_JOB_ID"; then
  say "exit code $code: queued again, goes on where it stopped"
else
  say "error: exit code $code, and the job cannot be queued again; submit it anew, it goes on where it stopped"
fi
exit "$code"
