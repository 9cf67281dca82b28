#!/usr/bin/env bash
# One RL run over several hosts by Ray: the trainer on one, engines and worlds (rl.where=Ray(...) in the experiment) on the others.
#   launch/ray.sh [-a ADDRESS] [-p PORT] [-c CPUS] [-g GPUS] [-j] experiments.mine:run --workdir W [--set path=value]
# Give every host the same line. -a is the IP address of the trainer's host: there Ray's head starts and the line of
# `python -m glm45_jax.main` runs; every other host (or one with -j) joins it, lends what it has, and leaves when it ends.
# -c -g  CPUs and GPUs that this host lends (who joins: all; the trainer's host: 0)      -p  port of the head (6379)
# Without -a there is one host: the run starts Ray itself, on loopback. With another address than loopback Ray listens on every
# interface and asks for a token: `python -m ray.scripts.scripts get-auth-token --generate` once, and the same file ~/.ray/auth_token
# on all hosts. They need the same checkout, folder and Python too. GLM45_PYTHON is the Python; .venv/bin/python is.
set -uo pipefail

WAIT_S=600 # of a host that joins, for the head

say() { printf 'ray: %s\n' "$*" >&2; }
usage() {
  sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

address="" port=6379 cpus="" gpus="" join=""
while getopts ':a:p:c:g:jh' option; do
  case $option in
    a) address=$OPTARG ;;
    p) port=$OPTARG ;;
    c) cpus=$OPTARG ;;
    g) gpus=$OPTARG ;;
    j) join=yes ;;
    *) usage ;;
  esac
done
shift $((OPTIND - 1))
[ $# -ge 1 ] || usage
for number in "$port" "${cpus:-0}" "${gpus:-0}"; do
  case $number in '' | *[!0-9]*) say "$number is not a number" && usage ;; esac
done
case $address in *[!0-9a-fA-F.:]*) say "-a $address is not an IP address" && usage ;; esac
case $join$address in yes | yes127.* | yes::1) say "-j needs -a and an address that is not loopback" && usage ;; esac

python=${GLM45_PYTHON:-.venv/bin/python}
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/glm45_jax/compiled}

if [ -z "$address" ]; then
  unset RAY_ADDRESS
  exec "$python" -m glm45_jax.main "$@"
fi

# The name of the switch is Ray's; what it does on every system is to stay on loopback.
case $address in 127.* | ::1) export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 ;; esac
case " 127.0.0.1 ::1 $(hostname -I 2>/dev/null) " in
  *" $address "*) here=yes ;;
  *) here="" ;;
esac

pids=() ended="" # of main and of Ray, both ours
stop() {
  ended=yes
  kill -TERM "${pids[0]}" 2>/dev/null
}
trap stop TERM INT

ray=("$python" -m ray.scripts.scripts)
answers() { (exec 3<>"/dev/tcp/$address/$port") 2>/dev/null; }
wait_for() { # until the process ends; sets $code. A signal wakes `wait` before
  while :; do
    wait "$1"
    code=$?
    kill -0 "$1" 2>/dev/null || break
  done
}

if [ -z "$join" ] && [ -n "$here" ]; then
  "${ray[@]}" start --head --block --node-ip-address "$address" --port "$port" --include-dashboard false \
    --num-cpus "${cpus:-0}" --num-gpus "${gpus:-0}" >&2 &
  head=$!
  until answers; do
    kill -0 "$head" 2>/dev/null || { say "Ray did not start at $address:$port" && exit 1; }
    sleep 0.2
  done
  RAY_ADDRESS=$address:$port "$python" -m glm45_jax.main "$@" &
  pids=($!)
  [ -z "$ended" ] || stop # a signal came in between
  wait_for "${pids[0]}"
  kill -TERM "$head" 2>/dev/null
  wait "$head" 2>/dev/null
  exit "$code"
fi

until answers; do
  [ -z "$ended" ] || exit 143
  [ "$SECONDS" -lt "$WAIT_S" ] || { say "nobody answers at $address:$port after $WAIT_S s" && exit 1; }
  sleep 0.5
done
lent=()
[ -z "$cpus" ] || lent+=(--num-cpus "$cpus")
[ -z "$gpus" ] || lent+=(--num-gpus "$gpus")
"${ray[@]}" start --block --address "$address:$port" "${lent[@]}" >&2 &
pids=($!)
[ -z "$ended" ] || stop
wait_for "${pids[0]}"
[ -z "$ended" ] || exit 143
answers && say "Ray ended here with $code, and the head goes on" && exit 1
exit 0
