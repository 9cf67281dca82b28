#!/usr/bin/env bash
# One run on every host of a TPU slice: the same line on each, over ssh. JAX finds the others by the slice's metadata.
#   TPU=name ZONE=us-east5-a [PROJECT=...] [FOLDER=glm45_jax] launch/tpu_pod.sh experiments.pretrain:glm45 --workdir gs://...
# FOLDER is where the repository lies on the hosts, with `make setup` and `pip install "jax[tpu]"` done there.
set -euo pipefail

if [ $# -lt 1 ] || [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ]; then
  sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
line=$(printf '%q ' "$@")
where=(--zone "$ZONE" --worker all)
[ -z "${PROJECT:-}" ] || where+=(--project "$PROJECT")
exec gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" \
  --command "cd $(printf '%q' "${FOLDER:-glm45_jax}") && GLM45_DISTRIBUTED=auto .venv/bin/python -m glm45_jax.main $line"
