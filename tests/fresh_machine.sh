#!/usr/bin/env bash
# README's two commands on a machine where nothing is installed: a new Debian in a folder, as root.
#
#   tests/fresh_machine.sh FOLDER [make's arguments for the tests, such as PYTEST="-q -x"]
#
# Makes FOLDER with debootstrap unless it is there already, clones the last commit into it, and runs `make demo` and
# `make test` there, in that order: what the demo leaves behind is part of what the tests must stand. Needs some 20 GB,
# and most of an hour on two cores. This machine's certificates, its pip configuration and its name server are taken
# over: they say how to reach packages, and install none. Not part of CI.
set -euo pipefail
folder=${1:?usage: tests/fresh_machine.sh FOLDER [make arguments]}
shift
repository=$(cd "$(dirname "$0")/.." && pwd)
[ "$(id -u)" = 0 ] || { echo "Needs root, for debootstrap and chroot."; exit 2; }
command -v debootstrap > /dev/null || apt-get install -y -qq debootstrap

if [ ! -e "$folder/etc/debian_version" ]; then
  suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-stable}")
  # What a person has before the first command: git to clone, make, and Python.
  debootstrap --variant=minbase --include=ca-certificates,git,make,python3 "$suite" "$folder"
fi
folder=$(cd "$folder" && pwd)
cp -L /etc/resolv.conf /etc/hosts "$folder/etc/"
cp -L /etc/ssl/certs/ca-certificates.crt "$folder/etc/ssl/certs/ca-certificates.crt"
[ ! -e /etc/pip.conf ] || cp /etc/pip.conf "$folder/etc/pip.conf"
rm -rf "$folder/work"
git clone --quiet "$repository" "$folder/work"

# Name spaces of its own: what it mounts and starts ends with it.
exec unshare --mount --pid --fork bash -s "$folder" "$@" << 'INSIDE'
set -euo pipefail
folder=$1; shift
mount --make-rprivate /
mount -t proc proc "$folder/proc"
mount --rbind /sys "$folder/sys"
mount --rbind /dev "$folder/dev"
mount -t tmpfs tmpfs "$folder/tmp" -o mode=1777
kept=$(env | grep -E '^(PIP_(CERT|DEFAULT_TIMEOUT|INDEX_URL)|SSL_CERT_(FILE|DIR)|[a-zA-Z]+_proxy|[A-Z]+_PROXY)=' || true)
mapfile -t variables <<< "$kept"
inside() { chroot "$folder" /usr/bin/env -i HOME=/root LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin "${variables[@]/#/}" "$@"; }
inside sh -c '. /etc/os-release; echo "$PRETTY_NAME, $(python3 --version), $(nproc) cores"; cd /work && git log -1 --format=%h'
inside make -C /work demo
inside make -C /work test "$@"
INSIDE
