# shellcheck shell=bash
# Sourced by deploy/demo.sh and .ci/test: what a bare Debian or Ubuntu lacks.

# debian_packages NAME... installs those that are missing, as root or where sudo asks for no password; else says how. Never fails.
debian_packages() {
  local name missing=() as=()
  for name; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || missing+=("$name")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" != 0 ]; then
    if ! sudo -n true 2>/dev/null; then
      echo "not installed: ${missing[*]}. To have what needs them: sudo apt-get install ${missing[*]}" >&2
      return 0
    fi
    as=(sudo)
  fi
  echo "installing Debian packages: ${missing[*]}" >&2
  { "${as[@]}" apt-get update -qq && "${as[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >/dev/null ||
    echo "apt-get failed, going on without: ${missing[*]}" >&2
}

# virtual_environment DIRECTORY makes it if it is not there; the interpreter is $PYTHON, else python3 (3.10 or later).
virtual_environment() {
  local python=${PYTHON:-python3}
  [ -x "$1/bin/pip" ] && return 0
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "$("$python" --version 2>&1 || echo "$python not found"): edgekws needs Python 3.10 or later. Name one: PYTHON=python3.12 bash $0" >&2
    return 1
  }
  "$python" -c 'import ensurepip' 2>/dev/null || debian_packages python3-venv
  "$python" -m venv "$1" || {
    echo "no virtual environment could be made in $1. Try: sudo apt-get install python3-venv" >&2
    return 1
  }
}
