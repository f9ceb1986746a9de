#!/usr/bin/env bash
# deploy/Containerfile for real, run by hand: built with podman, and used as its first lines say.
#   sudo bash tests/container.sh [--suite jammy|noble|bookworm] [--arch amd64|arm64] [--root DIRECTORY]
# Under it lies no image of NVIDIA's but what debootstrap makes, kept in --root (default: build/container-SUITE-ARCH): jammy (default) and noble
# are what JetPack 6 and 7 have. The Debian package is built anew. Another architecture than this machine's runs under qemu.
# Exit code 1 at the first thing that does not hold.
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/setup.sh

suite=jammy arch=$(dpkg --print-architecture) root=''
while [ $# -gt 0 ]; do
  case "$1 ${2:-}" in
  "--suite jammy" | "--suite noble" | "--suite bookworm") suite=$2 ;;
  "--arch amd64" | "--arch arm64") arch=$2 ;;
  --root\ ?*) root=$(realpath -m "$2") ;;
  *)
    echo "$1 ${2:-}: accepted are --suite jammy|noble|bookworm, --arch amd64|arm64 and --root DIRECTORY" >&2
    exit 2
    ;;
  esac
  shift 2
done
root=${root:-$PWD/build/container-$suite-$arch}
[ "$(id -u)" = 0 ] || { echo "this needs root: sudo bash tests/container.sh" >&2 && exit 1; }
mirror=http://archive.ubuntu.com/ubuntu components=main,universe recipe=gutsy
[ "$arch" = amd64 ] || mirror=http://ports.ubuntu.com/ubuntu-ports
case $suite in
jammy) python=3.10 ;;
noble) python=3.12 ;;
bookworm) python=3.11 mirror=http://deb.debian.org/debian components=main recipe=sid ;;
esac

debian_packages debootstrap podman
[ "$arch" = "$(dpkg --print-architecture)" ] || debian_packages qemu-user-static
[ -e "$root/.made" ] || {
  debootstrap --arch="$arch" --variant=minbase --components=$components "$suite" "$root" "$mirror" "/usr/share/debootstrap/scripts/$recipe"
  touch "$root/.made"
}
bash deploy/build-deb.sh --arch "$arch" --python $python
name=edgekws-test-$$
trap 'podman rm -f -t 0 $name; podman volume rm -f $name; podman rmi -f $name $name-base' EXIT
tar -C "$root" -c . | podman import --quiet --arch "$arch" - $name-base
podman build --platform "linux/$arch" -f deploy/Containerfile --build-arg "BASE=localhost/$name-base" -t $name .

held() { # what, and the command that shows it
  "${@:2}" || { echo "DOES NOT HOLD: $1" >&2 && exit 1; }
  echo "holds: $1"
}
edgekws() { podman run --rm --network none -v $name:/var/lib/edgekws -v "$PWD/edgekws/demo:/demo:ro" $name "$@"; }
stopped() { # within 3 s, far from the 10 s after which it is killed
  local start=$SECONDS
  podman stop -t 10 $name && [ $((SECONDS - start)) -le 3 ]
}
same() { [ "$1" = "$2" ] || { echo "$1 is not $2" >&2 && false; }; }

held "its user is not root" same "$(podman run --rm --entrypoint whoami $name)" edgekws
podman image inspect -f 'the image has {{.Size}} bytes for {{.Architecture}}' $name
if [ "$arch" = arm64 ]; then
  held "TensorRT's engine would find CUDA's bindings" podman run --rm --entrypoint python3 $name -I -c \
    'import sys; sys.path.insert(0, "/usr/lib/edgekws"); import cuda.bindings.runtime'
fi
if [ "$arch" != "$(dpkg --print-architecture)" ]; then
  echo "enrolling takes an hour under qemu: what it hears there is tests/board.sh's to show"
  exit
fi
edgekws enroll "open sesame" /demo/enrol-1.flac /demo/enrol-2.flac /demo/enrol-3.flac
held "a file is heard: five wakes" same "$(edgekws run --source file:/demo/stream.flac --json | grep -c '"kind": "wake"')" 5
held "the volume keeps them for the next container" same "$(edgekws log --kind wake --json | grep -c '"open sesame"')" 5
held "a listener without a microphone fails, so that --restart tries again" same "$(edgekws run 2>/dev/null || echo $?)" 1
podman run -d -i --name $name --network none -v $name:/var/lib/edgekws $name run --source stdin:
until podman logs $name 2>&1 | grep -q 'listening to stdin:'; do sleep 0.2; done
held "a listener stops at once" stopped
held "as at a file's end" same "$(podman inspect -f '{{.State.ExitCode}}' $name)" 0
podman rm $name
podman run -d -i --name $name --network none $name run --source stdin:
held "one that is still starting stops at once too" stopped
edgekws doctor || true # tells that there is no microphone
