# shellcheck shell=bash
# Installs what is missing; sourced by ./try, ./check and tools/build-* from the root of a clone or an
# unpacked source distribution. Quiet and fast if nothing is missing.
# SPDX-License-Identifier: Apache-2.0

PYTHON=/usr/bin/python3 # the distribution's: its bcc is built for it

QEMU=qemu-system-x86
[ "$(uname -m)" != aarch64 ] || QEMU=qemu-system-arm

say() { printf 'ebpf-mig: %s\n' "$*" >&2; }
fail() { say "$1"; exit 3; }

# need_packages PACKAGE...: apt-get installs those that are not installed.
need_packages() {
  local missing=() package
  for package in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null)" = "ii " ] || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || fail "these packages are missing and there is no apt-get to install them: ${missing[*]}"
  [ "$(id -u)" = 0 ] || fail "these packages are missing: run as root, or first: sudo apt-get install ${missing[*]}"
  say "installing ${missing[*]}"
  apt-get update -qq || fail "apt-get update failed: is there a network?"
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
    fail "apt-get could not install ${missing[*]}"
}

# need_venv [EXTRA]: .venv sees the distribution's bcc, and has our package (editable) with its dependencies.
# Stamp files record which pyproject.toml was installed. Each extra includes the plain set.
need_venv() {
  local extra=${1:-} want
  want="$("$PYTHON" -V) $(sha256sum <pyproject.toml)"
  [ "$(cat ".venv/stamp$extra" 2>/dev/null)" != "$want" ] || return 0
  say "preparing .venv${extra:+ with $extra}"
  [ "$(cat .venv/stamp 2>/dev/null)" = "$want" ] || "$PYTHON" -m venv --clear --system-site-packages .venv ||
    fail "cannot make .venv"
  .venv/bin/pip install --quiet --disable-pip-version-check -e ".$extra" ||
    fail "pip could not install what pyproject.toml names"
  printf '%s\n' "$want" | tee .venv/stamp >".venv/stamp$extra"
}

# export_sources DIRECTORY: copies what the packages are built from, and sets SOURCE_DATE_EPOCH to the commit's time.
# In a clone: HEAD. Without git: the files as they are, and the time that `git archive` wrote into tools/source-date.
export_sources() {
  mkdir -p "$1"
  if [ -e .git ]; then
    need_packages git
    git archive HEAD | tar x -C "$1" || fail "git could not read this clone"
  else
    tar c --exclude=./{build,dist,debian,PKG-INFO,setup.cfg,tests/fuzz/found} --exclude={'*.egg-info',__pycache__} \
      --exclude=./.{venv,hypothesis,mypy_cache,pytest_cache,ruff_cache} . | tar x -C "$1"
  fi
  chmod -R u=rwX,go=rX "$1" # a wheel stores the modes
  SOURCE_DATE_EPOCH=$(cat "$1/tools/source-date")
  [[ $SOURCE_DATE_EPOCH =~ ^[0-9]+$ ]] ||
    fail "tools/source-date has no time: build from a clone, or from an archive that git or tools/build-wheel made"
  export SOURCE_DATE_EPOCH
}
