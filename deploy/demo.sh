#!/usr/bin/env bash
# From a clone to a wake: a virtual environment in .venv, edgekws in it, then `edgekws demo`. Arguments go to that command.
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/setup.sh

debian_packages libportaudio2 # the microphone; without it the demo plays its bundled stream only
virtual_environment .venv
.venv/bin/pip install --quiet --disable-pip-version-check .
exec .venv/bin/edgekws demo "$@"
