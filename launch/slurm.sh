#!/usr/bin/env bash
# One run on the nodes of a Slurm job, a process a node; requeued when it is preempted, going on from its last checkpoint.
#   sbatch --nodes 16 --gpus-per-node 8 [--time ...] launch/slurm.sh experiments.pretrain:glm45_air --workdir W [--set ...]
# Slurm says which node is which; JAX reads it. Two minutes before the end of the time, or at a preemption, every process gets
# SIGTERM, saves and leaves with 143: the job goes back into the queue. W must be on a disk that all nodes share.
#SBATCH --job-name=glm45_jax
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=glm45_jax-%j.log
set -uo pipefail

if [ $# -lt 1 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
  sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  [ -n "${SLURM_JOB_ID:-}" ] || printf 'slurm: no SLURM_JOB_ID: send this file with sbatch\n' >&2
  exit 2
fi

export GLM45_DISTRIBUTED=auto
srun --kill-on-bad-exit=1 "${GLM45_PYTHON:-.venv/bin/python}" -m glm45_jax.main "$@" &
step=$!
trap 'kill -TERM "$step" 2>/dev/null' TERM # srun hands it on to every process
code=0
while :; do
  wait "$step"
  code=$?
  kill -0 "$step" 2>/dev/null || break # else a signal woke us
done
if [ "$code" = 143 ]; then
  printf 'slurm: stopped with a checkpoint; requeued\n' >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
