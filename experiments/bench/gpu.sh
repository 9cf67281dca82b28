#!/usr/bin/env bash
# What is measured on a GPU machine, in one go: the train step beside its peers, then kernels against their references.
# usage: experiments/bench/gpu.sh OUT_FOLDER
set -uo pipefail
out=${1:?usage: experiments/bench/gpu.sh OUT_FOLDER}
export PYTHONUNBUFFERED=1
python -m experiments.bench.train_step --peer 2>&1 | grep -v '^WARNING' | tail -20
GLM45_TEST_PLATFORM=cuda python -m pytest -q -m gpu -p no:cacheprovider -W ignore 2>&1 | tail -15
cp experiments/bench/results/*.json "$out"/
