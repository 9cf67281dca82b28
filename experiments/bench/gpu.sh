#!/usr/bin/env bash
# What is measured on a GPU machine, in one go: kernels against their references and peers, then the train step
# beside its peers.
# usage: experiments/bench/gpu.sh OUT_FOLDER
set -uo pipefail
out=${1:?usage: experiments/bench/gpu.sh OUT_FOLDER}
export PYTHONUNBUFFERED=1
GLM45_TEST_PLATFORM=cuda python -m pytest -m gpu tests/kernels 2>&1 | tail -15
python -m experiments.bench.kernels --only grouped_matmul 2>&1 | grep -v '^WARNING'
python -m experiments.bench.train_step --peer 2>&1 | grep -v '^WARNING' | tail -20
cp experiments/bench/results/*.json "$out"/
