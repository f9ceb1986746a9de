#!/usr/bin/env bash
# edgekws as a service on a Jetson with JetPack 6 or 7, or on any Debian or Ubuntu with Python 3.10 to 3.12:
#   sudo bash deploy/install.sh [--torch INDEX|WHEEL] [--jetpack 6|7] [--dry-run]
#   sudo bash deploy/install.sh uninstall [--purge] [--dry-run]
# --dry-run   prints each step and does none.
# --torch     NVIDIA's torch for this JetPack, for learning on the device: the address of its package index, or a wheel. It is never taken from
#             elsewhere: the one that pip finds by itself has no code for a Jetson's GPU. Without it a torch that is there already is used.
# --jetpack   where it is not read from /etc/nv_tegra_release.
# --purge     deletes recordings, events, models and settings too; without it they stay. What [store] root keeps elsewhere is only named.
# JetPack's own packages are used (TensorRT, CUDA) and none is changed: all goes into /opt/edgekws. To change the settings later:
# /etc/edgekws/edgekws.toml, then sudo systemctl restart edgekws. To upgrade: the same command in a newer clone.
set -euo pipefail
umask 022
cd "$(dirname "$0")/.."

action=install dry='' purge='' torch='' jetpack=''
while [ $# -gt 0 ]; do
  case $1 in
  install | uninstall) action=$1 ;;
  --dry-run) dry=1 ;;
  --purge) purge=1 ;;
  --torch) torch=${2:?--torch needs an index address or a wheel} && shift ;;
  --jetpack) jetpack=${2:?--jetpack needs 6 or 7} && shift ;;
  *)
    echo "$1: accepted are install, uninstall, --dry-run, --purge, --torch INDEX|WHEEL and --jetpack 6|7" >&2
    exit 2
    ;;
  esac
  shift
done

home=/opt/edgekws state=/var/lib/edgekws settings=/etc/edgekws/edgekws.toml units=/etc/systemd/system
python=$home/venv/bin/python
complete=$home/complete # made by the last step of an installation; empty where learning at night was never turned on, as it once was only with torch

fail() {
  echo "$1" >&2
  exit "${2:-1}"
}
do_() { # a step: said, and done
  step="$(printf ' %q' "$@")"
  echo "+$step"
  [ -n "$dry" ] || "$@"
}
[ -d /run/systemd/system ] || export SYSTEMD_OFFLINE=1 # in a chroot, as where an image is made: enabled, and started by its next boot
[ -n "$dry" ] || [ "$(id -u)" = 0 ] || fail "this needs root: sudo bash deploy/install.sh. --dry-run shows what it would do"

packaged=$(dpkg-query -W -f='${db:Status-Status}' edgekws 2>/dev/null || true)
if [ "$action" = uninstall ]; then
  if [ "$packaged" = installed ]; then # beside it what this script installed may go, and what was recorded is the package's
    [ -d "$home" ] && [ -z "$purge" ] ||
      fail "edgekws is here as a Debian package: sudo apt-get remove edgekws, or purge to delete what was recorded too"
  fi
  do_ systemctl disable --now edgekws-adapt.timer edgekws-wyoming.service edgekws.service || true
  do_ systemctl stop edgekws-adapt.service || true
  do_ rm -rf "$units/edgekws.service" "$units/edgekws-wyoming.service" "$units/edgekws-adapt.service" "$units/edgekws-adapt.timer" \
    /usr/local/bin/edgekws "$home"
  do_ systemctl daemon-reload
  if [ "$packaged" = installed ]; then
    echo "the Debian package stays. So that it listens: sudo systemctl enable --now edgekws"
    exit 0
  fi
  do_ rm -f /usr/lib/sysusers.d/edgekws.conf
  root=$(sed -n "s/^ *\(store\.\)*root *= *[\"']\([^\"']*\)[\"'].*/\2/p" "$settings" 2>/dev/null || true)
  root=${root:-$state}
  if [ -n "$purge" ]; then
    case $root/ in
    "$state"/*) ;;
    *) echo "left: what was recorded is in $root, where other things may be too. Delete it yourself" ;;
    esac
    do_ rm -rf "$state" /etc/edgekws "$units/edgekws.service.d" "$units/edgekws-wyoming.service.d" "$units/edgekws-adapt.timer.d" \
      "$units/edgekws-adapt.service.d" \
      /var/lib/systemd/timers/stamp-edgekws-adapt.timer
    if getent passwd edgekws >/dev/null; then do_ userdel edgekws; fi
    if getent group edgekws >/dev/null; then do_ groupdel edgekws; fi
  else
    echo "kept: $root and /etc/edgekws (uninstall --purge deletes $state and /etc/edgekws)"
  fi
  exit 0
fi

if [ -z "$jetpack" ] && [ -f /etc/nv_tegra_release ]; then
  l4t=$(sed -n '1s/^# R\([0-9]*\).*/\1/p' /etc/nv_tegra_release)
  case $l4t in
  36) jetpack=6 ;;
  38 | 39) jetpack=7 ;;
  *) fail "L4T $l4t: edgekws needs JetPack 6 (L4T 36) or 7 (38, 39)" ;;
  esac
fi
case $jetpack in
6 | 7) constraints=(--constraint "deploy/constraints-jp$jetpack.txt") ;;
'') constraints=() ;;
*) fail "--jetpack $jetpack: accepted are 6 and 7" 2 ;;
esac
echo "for ${jetpack:+JetPack }${jetpack:-a machine without JetPack}"
if [ "$packaged" = installed ]; then
  fail "edgekws is here as a Debian package already. Remove that first: sudo apt-get remove edgekws (state and settings stay)"
fi

find_torch() { # the version of the one that is there, in the system or here
  local what='from importlib.metadata import version; print(version("torch"))'
  "$python" -c "$what" 2>/dev/null || /usr/bin/python3 -c "$what" 2>/dev/null || true
}
first=1 learnt=
if [ -f "$complete" ]; then
  first='' learnt=$(cat "$complete")
elif [ -f "$units/edgekws.service" ] && [ -f "$state/edgekws.db" ]; then # it has run: complete, and from before there was that file
  first='' learnt=$(find_torch)
fi

step=
trap '[ $? = 0 ] || echo "install.sh stopped at:$step
An edgekws that was here goes on listening as it was. The same command goes on from there; uninstall takes away what there is." >&2' EXIT

packages=()
for one in python3-venv libportaudio2 libasound2-plugins; do
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$one" 2>/dev/null)" = installed ] || packages+=("$one")
done
if [ ${#packages[@]} -gt 0 ]; then
  do_ apt-get update --quiet
  do_ env DEBIAN_FRONTEND=noninteractive apt-get install -y --quiet --no-install-recommends "${packages[@]}"
fi
# Anew where making it was cut short, or where the system has another Python since.
has_pip='import pip, sys; sys.exit(sys.prefix == sys.base_prefix)'
"$python" -c "$has_pip" 2>/dev/null || do_ /usr/bin/python3 -m venv --clear --system-site-packages "$home/venv"
pip=("$python" -m pip install --disable-pip-version-check "${constraints[@]}")
# With JetPack the bindings of CUDA that the TensorRT engine needs. No [jetson]: jtop's client must be of the version of its service, so
# that of the board is used.
do_ "${pip[@]}" --upgrade ".[wyoming,mqtt,metrics${jetpack:+,gpu}]"
# Whatever torch is there already, in the system or here, and be it newer.
case $torch in
'') ;;
*.whl)
  do_ "${pip[@]}" --force-reinstall --no-deps "$torch"
  do_ "${pip[@]}" "$torch"
  ;;
*)
  do_ "${pip[@]}" --force-reinstall --no-deps --index-url "$torch" torch
  do_ "${pip[@]}" --index-url "$torch" torch
  ;;
esac
# A round trains only where there is a torch, and pip is held to that one.
version=$(find_torch)
if [ -n "$dry" ] && [ -n "$torch" ]; then version=of-that-index; fi
if [ -n "$version" ]; then
  do_ "${pip[@]}" '.[train]' "torch==$version"
fi
if [ -n "$jetpack" ]; then
  do_ "$python" -c 'import numpy, sys; numpy.__version__ < "2" or sys.exit(f"numpy {numpy.__version__}: JetPack has packages compiled against 1.x")'
fi

do_ install -D -m 644 systemd/edgekws.sysusers /usr/lib/sysusers.d/edgekws.conf
do_ systemd-sysusers /usr/lib/sysusers.d/edgekws.conf
if getent group jtop >/dev/null; then do_ usermod -a -G jtop edgekws; fi
do_ install -d -o edgekws -g edgekws -m 700 "$state"
if [ ! -f "$settings" ]; then
  do_ install -D -m 644 deploy/edgekws.toml "$settings"
  do_ sed -i "s|^root = \"\"\$|root = \"$state\"|" "$settings"
fi
do_ install -m 644 -t "$units" systemd/edgekws.service systemd/edgekws-wyoming.service systemd/edgekws-adapt.service systemd/edgekws-adapt.timer
do_ install -D -m 644 systemd/network.conf "$home/network.conf"
do_ ln -sf "$home/venv/bin/edgekws" /usr/local/bin/edgekws
do_ systemctl daemon-reload
# Turned on by the first installation, also by one that goes on where it was cut short. From then on they are as their owner has them.
[ -z "$first" ] || do_ systemctl enable edgekws.service
if [ -z "$learnt" ]; then
  do_ systemctl enable --now edgekws-adapt.timer
else
  do_ systemctl try-restart edgekws-adapt.timer
fi
if [ -n "$first" ] || systemctl --quiet is-enabled edgekws.service; then
  do_ systemctl restart edgekws.service
else
  do_ systemctl try-restart edgekws.service
fi
do_ systemctl try-restart edgekws-wyoming.service # off until its owner turns it on
do_ install -m 644 /dev/stdin "$complete" <<<"${version:-without torch}"
do_ /usr/local/bin/edgekws doctor || true # as the service's account, by itself
[ -z "$dry" ] || { echo "nothing was done: this was a dry run" && exit 0; }
echo "it listens${SYSTEMD_OFFLINE:+ from the next boot on}: journalctl -fu edgekws. Your own word: sudo edgekws enroll \"hey kitchen\" a.wav b.wav c.wav"
