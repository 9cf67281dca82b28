#!/usr/bin/env bash
# One run on the nodes of a Slurm job, a process a node; requeued when it is preempted or fails, going on from its last checkpoint.
#   sbatch --nodes 16 --gpus-per-node 8 [--time ...] launch/slurm.sh experiments.pretrain:glm45_air --workdir W [--set ...]
# Slurm says which node is which; JAX reads it. Two minutes before the end of the time, or at a preemption, every process gets
# SIGTERM, saves and leaves with 143: the job goes back into the queue. So it does, up to GLM45_REQUEUES (3) times between two such
# saves, when a step hangs (the watchdog leaves with 6) or a process dies; not after bad input (2), more left-out steps than allowed
# (3) or a gate of RL (4, 5). W must be on a disk that all nodes share.
#SBATCH --job-name=glm45_jax
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=glm45_jax-%j.log
set -uo pipefail

say() { printf 'slurm: %s\n' "$*" >&2; }

if [ $# -lt 1 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
  sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  [ -n "${SLURM_JOB_ID:-}" ] || say "no SLURM_JOB_ID: send this file with sbatch"
  exit 2
fi
most=${GLM45_REQUEUES:-3}
case $most in '' | *[!0-9]*) say "GLM45_REQUEUES=$most is not a number" && exit 2 ;; esac

export GLM45_DISTRIBUTED=auto
# Processes leave one after another, the first one last: it writes the report. Who is left after five minutes waits for one that is
# gone. Killing them at once, at the first code that is not 0, would hide that code and cut the report.
srun --kill-on-bad-exit=0 --wait=300 "${GLM45_PYTHON:-.venv/bin/python}" -m glm45_jax.main "$@" &
step=$!
trap 'kill -TERM "$step" 2>/dev/null' TERM # srun hands it on to every process
code=0
while :; do
  wait "$step"
  code=$?
  kill -0 "$step" 2>/dev/null || break # else a signal woke us
done

# srun's code is the highest of all processes: where one leaves with 6 and another has to be killed, that is 137.
failures=glm45_jax-$SLURM_JOB_ID.failures # a line each, since the last good stop
case $code in
  0 | 2 | 3 | 4 | 5) ;;
  143)
    rm -f "$failures"
    say "stopped with a checkpoint; requeued"
    scontrol requeue "$SLURM_JOB_ID"
    ;;
  *)
    printf '%s\n' "$code" >>"$failures"
    if [ "$(wc -l <"$failures")" -gt "$most" ]; then
      say "ended with $code, as $most times before; not requeued ($failures)"
      exit "$code"
    fi
    say "ended with $code; requeued, to go on from the last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
    ;;
esac
exit "$code"
