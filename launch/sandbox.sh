#!/usr/bin/env bash
# Makes sure of bubblewrap, in which model-written code runs, and prints its path on stdout. Needs no root.
#   launch/sandbox.sh           the one on PATH, else Debian's package fetched and unpacked into .cache/bwrap
#   launch/sandbox.sh --which   only look; fails where there is none
# glm45_jax.envs.sandbox looks at $GLM45_BWRAP, PATH and .cache/bwrap, in that order, as this does.
set -euo pipefail

case "${BASH_SOURCE[0]}" in */*) here=${BASH_SOURCE[0]%/*} ;; *) here=. ;; esac
root=$(cd "$here/.." && pwd)
folder=$root/.cache/bwrap
fetched=$folder/usr/bin/bwrap

say() { printf 'sandbox: %s\n' "$*" >&2; }
fail() {
  printf 'sandbox: error: %s\n' "$*" >&2
  exit 1
}

# A binary of another release may miss a library: it counts only if it runs.
runs() { [ -n "$1" ] && "$1" --version >/dev/null 2>&1; }

if [ -n "${GLM45_BWRAP:-}" ]; then
  runs "$GLM45_BWRAP" || fail "GLM45_BWRAP=$GLM45_BWRAP does not run"
  printf '%s\n' "$GLM45_BWRAP"
  exit 0
fi
for place in "$(command -v bwrap || true)" "$fetched"; do
  if runs "$place"; then
    printf '%s\n' "$place"
    exit 0
  fi
done
[ "${1:-}" = "--which" ] && fail "no bubblewrap; run launch/sandbox.sh"

for tool in apt-get dpkg-deb; do
  command -v "$tool" >/dev/null || fail "no $tool here: install bubblewrap by this system's own means"
done
mkdir -p "$root/.cache"
scratch=$(mktemp -d "$root/.cache/bwrap.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
say "fetching Debian's bubblewrap into $folder"
# Downloads as the calling user: apt's own user cannot write here, and says so.
(cd "$scratch" && apt-get -qq -o APT::Sandbox::User="$(id -un)" download bubblewrap >&2) ||
  fail "apt-get download bubblewrap failed; apt-get update (as root) may help"
dpkg-deb -x "$scratch"/bubblewrap_*.deb "$scratch/tree"
runs "$scratch/tree/usr/bin/bwrap" ||
  fail "the fetched bubblewrap does not run here: $("$scratch/tree/usr/bin/bwrap" --version 2>&1 | tail -n 1)"
rm -rf "$folder"
mv "$scratch/tree" "$folder"
printf '%s\n' "$fetched"
