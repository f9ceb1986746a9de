#!/usr/bin/env bash
# A board's user space on this machine: deploy/install.sh for real in an arm64 root under qemu, and what it hears there beside what is heard here.
#   sudo bash tests/board.sh [--root DIRECTORY] [--suite bookworm|jammy|noble] [FILE ...]
# The root is made by debootstrap, in minutes to half an hour, and kept: --root says where (default: build/board-SUITE). jammy and noble are what
# JetPack 6 and 7 have; bookworm, the default, has Python 3.11 between their 3.10 and 3.12. In it stands a file that says JetPack, so that the
# constraints of one hold; nothing of NVIDIA's is there, no GPU, no sound and no systemd that runs.
# Compared are the events of the bundled stream and of each FILE, by every packaged model and the default one in INT8: the same keywords at the
# same hops, scores and thresholds within 0.02. Exit code 1 if they differ. Here: .venv or $EDGEKWS_VENV, with the extra train.
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/setup.sh

suite=bookworm root='' files=()
while [ $# -gt 0 ]; do
  case $1 in
  --root) root=$(realpath -m "${2:?--root needs a directory}") && shift ;;
  --suite) suite=${2:?--suite needs bookworm, jammy or noble} && shift ;;
  -*)
    echo "$1: accepted are --root DIRECTORY, --suite bookworm|jammy|noble and files" >&2
    exit 2
    ;;
  *) files+=("$(realpath "$1")") ;;
  esac
  shift
done
root=${root:-$PWD/build/board-$suite}
[ "$(id -u)" = 0 ] || { echo "this needs root: sudo bash tests/board.sh" >&2 && exit 1; }
case $suite in
bookworm) mirror=http://deb.debian.org/debian more=() release=36 ;;
jammy) mirror=http://ports.ubuntu.com/ubuntu-ports more=("--components=main,universe") release=36 ;;
noble) mirror=http://ports.ubuntu.com/ubuntu-ports more=("--components=main,universe") release=39 ;;
*) echo "--suite $suite: accepted are bookworm, jammy and noble" >&2 && exit 2 ;;
esac

debian_packages debootstrap qemu-user-static
binfmt=/proc/sys/fs/binfmt_misc
[ -e $binfmt/register ] || mount -t binfmt_misc binfmt_misc $binfmt
if [ ! -e $binfmt/qemu-aarch64 ]; then # where no systemd-binfmt runs
  printf '%s' ':qemu-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:/usr/bin/qemu-aarch64-static:F' >$binfmt/register
fi
if [ ! -e "$root/.made" ]; then
  debootstrap --arch=arm64 --variant=minbase --include=python3,python3-venv,ca-certificates,systemd,libportaudio2,libasound2-plugins \
    "${more[@]}" "$suite" "$root" "$mirror"
  touch "$root/.made"
fi
cp --remove-destination /etc/resolv.conf /etc/hosts "$root/etc/"
rm -rf "$root/etc/ssl/certs" # as links they lead to the same place here
cp -rL /etc/ssl/certs "$root/etc/ssl/"
echo "# R$release (release), REVISION: 4.3, BOARD: none, DATE: an imitation by tests/board.sh" >"$root/etc/nv_tegra_release"
rm -rf "$root/srv/edgekws" "$root/srv/compared"
mkdir -p "$root/srv/edgekws" "$root/srv/compared"
cp -r deploy edgekws systemd pyproject.toml README.md LICENSE "$root/srv/edgekws/"
work=$(mktemp -d)
trap 'umount -q "$root/proc" "$root/sys"; rm -rf "$work"' EXIT
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys" # without it ONNX Runtime 1.23 for aarch64 aborts, as it finds no processor
mapfile -t pip < <(env | grep '^PIP_[A-Z_]*=' | grep -v FIND_LINKS)
there() { env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root "${pip[@]}" chroot "$root" "$@"; }

start=$SECONDS
there bash /srv/edgekws/deploy/install.sh
echo "installed in $((SECONDS - start)) s: $(there uname -m), $(there /opt/edgekws/venv/bin/python -VV)"
there /opt/edgekws/venv/bin/python -m pip list 2>/dev/null | grep -E '^(numpy|onnxruntime|soxr|soundfile|sounddevice|cuda-bindings|torch|tensorrt) '

export PYTHONPATH=$PWD STATE_DIRECTORY=$work/state OMP_NUM_THREADS=1
here() { "${EDGEKWS_VENV:-.venv}/bin/python" "$@"; }
mkdir "$STATE_DIRECTORY"
compared=$root/srv/compared
here - "$compared/int8" <<'END'
import sys
from pathlib import Path

import numpy as np

from edgekws.audio import read_recording
from edgekws.frontend import LogMel
from edgekws.model import find_model, load_model
from edgekws.training.quantise import version
from edgekws.values import HOP_SAMPLES

samples, frontend = read_recording(Path("edgekws/demo/stream.flac")), LogMel()
hops = [frontend.hop(samples[i : i + HOP_SAMPLES]) for i in range(0, len(samples) - HOP_SAMPLES + 1, HOP_SAMPLES)]
version(load_model(find_model()), Path(sys.argv[1]), id="int8", precision="int8", frames=np.stack(hops))
END
for file in "$PWD/edgekws/demo/stream.flac" "${files[@]}"; do cp "$file" "$compared/"; done
here -m edgekws enroll "open sesame" edgekws/demo/enrol-*.flac
each() { # model file: where it is here, where there, the name of what comes of it
  for model in edge edge-small edge-tiny ds-cnn-l int8; do
    for file in "$compared"/*.*; do "$1" "$model" "$(basename "$file")" "$work/$model.$(basename "$file")"; done
  done
}
hear_here() { here -m edgekws run --model "${1/#int8/$compared/int8}" --source "file:$compared/$2" --json >"$3.here" 2>"$3.log"; }
hear_there() {
  echo "hearing $2 there by $1"
  there edgekws run --model "${1/#int8//srv/compared/int8}" --source "file:/srv/compared/$2" --json >"$3.there" 2>"$3.log" || {
    cat "$3.log" >&2
    exit 1
  }
}
each hear_here
rm -rf "$root/var/lib/edgekws" # what is enrolled here: enrolling reads an hour of speech, which takes minutes under qemu
cp -r "$STATE_DIRECTORY" "$root/var/lib/edgekws"
there chown -R edgekws: /var/lib/edgekws
each hear_there
here - "$work" <<'END'
import json
import sys
from pathlib import Path

TOLERANCE = 0.02  # of scores and thresholds, in decades of how rare a likeness is; ARM sums in another order than x86-64 does
differ = False
for path in sorted(Path(sys.argv[1]).glob("*.here")):
    sides = [
        [one for one in map(json.loads, file.read_text().splitlines()) if one["kind"] == "wake"] for file in (path, path.with_suffix(".there"))
    ]
    here, there = ([(one["keyword"], one["stream_s"]) for one in side] for side in sides)
    off = [max((abs(a[name] - b[name]) for a, b in zip(*sides)), default=0.0) for name in ("score", "threshold")]
    same = here == there and max(off) <= TOLERANCE
    differ = differ or not same
    took = path.with_suffix(".log").read_text().splitlines()[-1].removeprefix("edgekws: ")
    print(f"{'same' if same else 'DIFFERS'}  {path.stem}: {len(here)} wakes here, {len(there)} there; off by {off[0]:.4f} in score,"
          f" {off[1]:.4f} in threshold; there {took}")
    for gone, place in ((set(here) - set(there), "here"), (set(there) - set(here), "there")):
        for keyword, stream_s in sorted(gone):
            print(f"         only {place}: {keyword} at {stream_s:.2f} s")
sys.exit(differ)
END
