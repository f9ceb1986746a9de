#!/usr/bin/env bash
# From a clone to a wake, and to a version that has learned: a virtual environment in .venv, edgekws in it, then `edgekws demo`.
# Arguments go to that command.
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/setup.sh

debian_packages libportaudio2 # the microphone; without it the demo plays its bundled stream only
virtual_environment .venv
.venv/bin/pip install --quiet --disable-pip-version-check .
# To train in the room it needs PyTorch; exact, so that a CPU build (2.13.0+cpu) that is there is taken. Without it prototypes alone move.
.venv/bin/python -c 'import torch' 2>/dev/null ||
  echo "installing PyTorch, to learn from the room with: gigabytes on x86-64, unless pip is told of a place with the CPU build" >&2
.venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 && .venv/bin/pip install --quiet --disable-pip-version-check '.[train]' ||
  echo "PyTorch could not be installed, going on without training" >&2
exec .venv/bin/edgekws demo "$@"
