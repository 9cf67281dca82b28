#!/usr/bin/env bash
# One run in several processes on this machine, as on several hosts; started again from its last checkpoint when a process dies.
#   launch/local.sh -n 4 [-r 3] [-d 2] experiments.pretrain:tiny --workdir W [--set path=value]
# -n  processes (1)      -r  how often to start again (0)      -d  virtual CPU devices a process (JAX's own choice)
# The line after the options is that of `python -m glm45_jax.main`. Process 0 writes to this terminal, the others into
# W/hosts/<number>.log. Ended by bad input (2), by more left-out steps than allowed (3), by a gate of RL (4, 5) or by a signal after a
# checkpoint (143), a run is not started again. GLM45_PYTHON is the Python; .venv/bin/python is.
set -uo pipefail

say() { printf 'local: %s\n' "$*" >&2; }
usage() {
  sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

processes=1 retries=0 devices=""
while getopts ':n:r:d:h' option; do
  case $option in
    n) processes=$OPTARG ;;
    r) retries=$OPTARG ;;
    d) devices=$OPTARG ;;
    *) usage ;;
  esac
done
shift $((OPTIND - 1))
[ $# -ge 1 ] || usage
for number in "$processes" "$retries" "${devices:-1}"; do
  case $number in '' | *[!0-9]*) say "$number is not a number" && usage ;; esac
done
[ "$processes" -ge 1 ] || usage

python=${GLM45_PYTHON:-.venv/bin/python}
logs="" previous=""
for word in "$@"; do
  [ "$previous" = --workdir ] && logs=$word/hosts
  previous=$word
done
if [ "$processes" -gt 1 ] && [ -z "$logs" ]; then
  say "give --workdir W: the other processes write to W/hosts" && exit 2
fi
[ -n "$devices" ] && export JAX_NUM_CPU_DEVICES=$devices JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

pids=() stopping=""
stop() { # the run saves a checkpoint and leaves; all processes are told
  stopping=yes
  kill -TERM "${pids[@]}" 2>/dev/null
}
trap stop TERM INT

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

start() { # the line of main, once a process
  local port i
  pids=()
  port=$(free_port)
  [ "$processes" -gt 1 ] && mkdir -p "$logs"
  for ((i = 0; i < processes; i++)); do
    if [ "$processes" -gt 1 ]; then export GLM45_DISTRIBUTED=127.0.0.1:$port,$processes,$i; fi
    if [ "$i" = 0 ]; then
      "$python" -m glm45_jax.main "$@" &
    else
      "$python" -m glm45_jax.main "$@" >>"$logs/$i.log" 2>&1 &
    fi
    pids+=($!)
  done
}

finish() { # sets $code: of the first process that failed; the others are ended then
  local running=("${pids[@]}") left one pid
  code=0
  while [ "${#running[@]}" -gt 0 ]; do
    sleep 0.1
    left=()
    for pid in "${running[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        left+=("$pid")
        continue
      fi
      wait "$pid"
      one=$?
      [ "$code" != 0 ] || code=$one
    done
    running=("${left[@]}")
    # The others wait for one that failed; after a signal, and where one left by itself, they are saving.
    if [ "${#running[@]}" -gt 0 ] && [ -z "$stopping" ]; then
      case $code in 0 | 143) ;; *) kill -KILL "${running[@]}" 2>/dev/null ;; esac
    fi
  done
}

for ((try = 0; ; try++)); do
  start "$@"
  finish
  case $code in 0 | 2 | 3 | 4 | 5 | 143) exit "$code" ;; esac
  [ -z "$stopping" ] || exit "$code"
  if [ "$try" -ge "$retries" ]; then
    say "a process ended with $code; started $((try + 1)) times, no more" && exit "$code"
  fi
  say "a process ended with $code; starting again from the last checkpoint ($((try + 1)) of $retries)"
done
