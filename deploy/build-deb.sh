#!/usr/bin/env bash
# A Debian package of the listener, with every Python package inside that it, MQTT, the metrics and the wake service need, so that a board
# without a network can install it:
#   bash deploy/build-deb.sh [--arch amd64|arm64] [--python 3.10|3.11|3.12]
# Without options for this machine. JetPack 6 is arm64 and 3.10, JetPack 7 arm64 and 3.12; any machine can build for any. Prints the file's path.
# Nothing is compiled, and no other Python on the board sees what is inside: JetPack's numpy stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."

arch=$(dpkg --print-architecture)
more=()
python=$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
while [ $# -gt 0 ]; do
  case "$1 ${2:-}" in
  "--arch amd64" | "--arch arm64") arch=$2 ;;
  "--python 3.10" | "--python 3.11" | "--python 3.12") python=$2 ;;
  *)
    echo "$1 ${2:-}: accepted are --arch amd64|arm64 and --python 3.10|3.11|3.12" >&2
    exit 2
    ;;
  esac
  shift 2
done
case $python in
3.10) glibc=35 constraints=deploy/constraints-jp6.txt more=('tomli>=2') ;; # Ubuntu 22.04. pip takes the builder's Python for the marker's.
3.11) glibc=36 constraints=deploy/constraints-jp7.txt ;; # Debian 12
3.12) glibc=39 constraints=deploy/constraints-jp7.txt ;; # Ubuntu 24.04
*)
  echo "Python $python: edgekws runs on 3.10, 3.11 and 3.12. Name the target's with --python" >&2
  exit 2
  ;;
esac
machine=x86_64
if [ "$arch" = arm64 ]; then
  machine=aarch64
  more+=(cuda-bindings) # for JetPack's TensorRT: 7 or 12 MB that only its engine opens
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip=(python3 -m pip --quiet --disable-pip-version-check)
if ! python3 -c 'import pip' 2>/dev/null; then # Debian's own Python brings none
  . deploy/setup.sh
  virtual_environment "$work/venv"
  pip=("$work/venv/bin/pip" --quiet --disable-pip-version-check)
fi
"${pip[@]}" wheel --no-deps --wheel-dir "$work/wheel" .
platforms=(--platform "manylinux2014_$machine")
for ((minor = 17; minor <= glibc; minor++)); do platforms+=(--platform "manylinux_2_${minor}_$machine"); done
root=$work/root
home=$root/usr/lib/edgekws
"${pip[@]}" install --target "$home" --only-binary :all: --implementation cp --python-version "$python" "${platforms[@]}" \
  --no-compile --constraint "$constraints" "$(echo "$work"/wheel/*.whl)[wyoming,mqtt,metrics]" "${more[@]}"
rm -rf "${home:?}/bin"
find "$home" -type d \( -name tests -o -name __pycache__ \) -prune -exec rm -rf {} +
if compgen -G "$home/torch" >/dev/null || compgen -G "$home/numpy-2*" >/dev/null; then
  echo "torch or numpy 2 was pulled in: $(ls "$home")" >&2
  exit 1
fi

# What is given on comes with its licence.
for package in "$home"/*.dist-info; do
  if [ -z "$(find "$package" -iname '*licen*' -type f)" ] && ! grep -q '^License' "$package/METADATA"; then
    echo "${package##*/} brings no licence" >&2
    exit 1
  fi
done

version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' edgekws/__init__.py)+py$python
install -D -m 755 /dev/stdin "$root/usr/bin/edgekws" <<'END'
#!/usr/bin/python3 -I
# Isolated from the caller's Python settings. What a user adds for training (torch) lies behind what the package brings.
import sys

sys.path[0:0] = ["/usr/lib/edgekws"]
sys.path.append("/usr/local/lib/edgekws")
from edgekws.__main__ import main

sys.exit(main())
END
sed 's|^root = ""$|root = "/var/lib/edgekws"|' deploy/edgekws.toml | install -D -m 644 /dev/stdin "$root/etc/edgekws/edgekws.toml"
install -D -m 644 -t "$root/lib/systemd/system" systemd/*.service systemd/*.timer
install -D -m 644 systemd/edgekws.sysusers "$root/usr/lib/sysusers.d/edgekws.conf"
install -D -m 644 systemd/network.conf "$root/usr/share/edgekws/network.conf"
install -D -m 644 "$constraints" "$root/usr/share/edgekws/constraints.txt"
install -D -m 644 -t "$root/usr/share/doc/edgekws" README.md
install -D -m 644 -t "$root/usr/share/doc/edgekws/docs" docs/*.md
{
  printf 'edgekws: Apache-2.0, as below. The Python packages in /usr/lib/edgekws have their licences in their *.dist-info directories:\n\n'
  for package in "$home"/*.dist-info; do
    sed -n -e '/^$/q' -e 's/^Name: //p' -e 's/^Version: //p' -e 's/^License-Expression: //p' -e '/^License: [^C].\{1,60\}$/s/^License: //p' \
      "$package/METADATA" | paste -s -d ' ' -
  done
  echo
  cat LICENSE
} | install -m 644 /dev/stdin "$root/usr/share/doc/edgekws/copyright"

mkdir -p "$root/DEBIAN"
echo /etc/edgekws/edgekws.toml >"$root/DEBIAN/conffiles"
next=3.$((${python#3.} + 1))
cat >"$root/DEBIAN/control" <<END
Package: edgekws
Version: $version
Architecture: $arch
Maintainer: edgekws <edgekws@localhost>
Installed-Size: $(du -sk --exclude=DEBIAN "$root" | cut -f1)
Depends: python3 (>= $python), python3 (<< $next), libportaudio2, libstdc++6, init-system-helpers, passwd, systemd
Recommends: libasound2-plugins
Section: sound
Priority: optional
Description: keyword-spotting daemon: three recordings make a wake word
 Listens always, on the device alone, and tells of each wake in the journal, a
 database and a command. Brings its Python packages with it.
END
# Maintainer scripts as debhelper's helpers would write them; here they can be read at once.
cat >"$root/DEBIAN/preinst" <<'END'
#!/bin/sh
set -e
if [ "$1" = install ] && [ -e /opt/edgekws/venv ]; then # not at an upgrade, where both have been there before
  echo "edgekws is here by deploy/install.sh already. Remove that first: sudo bash deploy/install.sh uninstall (state and settings stay)" >&2
  exit 1
fi
END
cat >"$root/DEBIAN/postinst" <<'END'
#!/bin/sh
set -e
if [ "$1" = configure ]; then
  systemd-sysusers /usr/lib/sysusers.d/edgekws.conf
  if getent group jtop >/dev/null; then usermod -a -G jtop edgekws; fi
  install -d -o edgekws -g edgekws -m 700 /var/lib/edgekws
  py3compile -p edgekws /usr/lib/edgekws
  for unit in edgekws.service edgekws-adapt.timer; do
    deb-systemd-helper unmask $unit >/dev/null
    if deb-systemd-helper --quiet was-enabled $unit; then
      deb-systemd-helper enable $unit >/dev/null
    else
      deb-systemd-helper update-state $unit >/dev/null # disabled by its owner: stays so
    fi
  done
  deb-systemd-helper update-state edgekws-wyoming.service >/dev/null # off until its owner turns it on
  if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    # Only now, so that it hears while the files are replaced.
    for unit in edgekws.service edgekws-adapt.timer; do
      if systemctl --quiet is-enabled $unit; then deb-systemd-invoke restart $unit || true; fi
    done
    if [ -n "$2" ]; then deb-systemd-invoke try-restart edgekws-wyoming.service || true; fi
  fi
fi
END
cat >"$root/DEBIAN/prerm" <<'END'
#!/bin/sh
set -e
if [ "$1" = remove ]; then
  if [ -d /run/systemd/system ]; then
    deb-systemd-invoke stop edgekws-adapt.timer edgekws-adapt.service edgekws-wyoming.service edgekws.service
  fi
fi
py3clean -p edgekws /usr/lib/edgekws || find /usr/lib/edgekws -name __pycache__ -prune -exec rm -rf {} +
END
cat >"$root/DEBIAN/postrm" <<'END'
#!/bin/sh
set -e
if [ -d /run/systemd/system ]; then systemctl daemon-reload || true; fi
if [ "$1" = remove ] && [ -x /usr/bin/deb-systemd-helper ]; then
  deb-systemd-helper mask edgekws.service edgekws-adapt.timer >/dev/null
fi
if [ "$1" = remove ]; then # at a purge the settings are gone already
  root=$(sed -n "s/^ *\(store\.\)*root *= *[\"']\([^\"']*\)[\"'].*/\2/p" /etc/edgekws/edgekws.toml 2>/dev/null || true)
  case ${root:-/var/lib/edgekws}/ in
  /var/lib/edgekws/*) ;;
  *) echo "left, also by a purge: what was recorded is in $root, where other things may be too. Delete it yourself" ;;
  esac
fi
if [ "$1" = purge ]; then
  if [ -x /usr/bin/deb-systemd-helper ]; then
    deb-systemd-helper purge edgekws.service edgekws-adapt.timer edgekws-wyoming.service >/dev/null
    deb-systemd-helper unmask edgekws.service edgekws-adapt.timer edgekws-wyoming.service >/dev/null
  fi
  rm -rf /var/lib/edgekws # recordings, events, models
  rm -f /var/lib/systemd/timers/stamp-edgekws-adapt.timer
  if getent passwd edgekws >/dev/null; then userdel edgekws; fi
  if getent group edgekws >/dev/null; then groupdel edgekws; fi
fi
END
chmod 755 "$root"/DEBIAN/p*
mkdir -p dist
file=dist/edgekws_${version}_$arch.deb
dpkg-deb --root-owner-group -Zxz -z1 --build "$root" "$file" >/dev/null
echo "$file"
