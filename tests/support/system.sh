#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Runs the tests in another Debian: `system.sh trixie` or `system.sh sid python3.15 pypy3 -- tests/qmp`, as root.
#
# The system is a folder, build/systems/NAME, that debootstrap makes the first time and that is used again
# (`rm -rf` of it, or `make clean`, and it is made anew). What git has of this folder is copied into it, with
# what was changed and is not ignored, and the tests run for each of its Pythons: those named, else all of them.
# What follows -- is for pytest. PYTEST_ADDOPTS, and what begins with PYBITMAP_, HYPOTHESIS_ or PIP_, goes there too.
#
# Whatever ends this, nothing is left mounted or running: mounts and processes have namespaces of their own. A
# folder that was not finished is made anew. Two at once on one system: the second is refused.
set -euo pipefail
cd "$(dirname "$0")/../.."

die() { printf 'system.sh: %s\n' "$*" >&2; exit 1; }

name=${1:?which system? trixie, sid, ...}
shift
case $name in *[!a-z0-9-]*) die "'$name' is no name of a Debian" ;; esac
[ "$(id -u)" = 0 ] || die "needs root, to chroot and to mount; nothing was run"
[ "$(uname -s)" = Linux ] || die "needs Linux; nothing was run"
for program in debootstrap unshare flock; do
    command -v "$program" > /dev/null || die "$program is missing (Debian packages debootstrap, util-linux); nothing was run"
done

mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
root=$PWD/build/systems/$name
packages=(btrfs-progs build-essential clang e2fsprogs fio fish gzip libclang-rt-dev libnbd-bin nbdkit nbdkit-plugin-python pkgconf procps
    pypy3 pypy3-dev pypy3-venv python3-all-dev python3-libnbd python3-venv qemu-system-common qemu-system-x86
    qemu-utils rsync xfsprogs zsh)

mkdir -p build/systems
exec 9> "$root.lock"
flock -n 9 || die "another run uses $root"

# In a mount and PID namespace of its own: debootstrap mounts too.
alone=(unshare --mount --pid --fork --kill-child)

if [ ! -d "$root" ]; then
    echo "== debootstrap $name"
    rm -rf --one-file-system "$root.partial"
    "${alone[@]}" debootstrap --variant=minbase "$name" "$root.partial" "$mirror"
    mv "$root.partial" "$root"
fi

# Names and certificates as they are here.
for file in /etc/resolv.conf /etc/hosts /etc/ssl/certs/ca-certificates.crt; do
    if [ -e "$file" ]; then
        mkdir -p "$root$(dirname "$file")"
        cp --remove-destination "$file" "$root$file"
    fi
done
# Once more for pip: the package of the certificates writes its own.
cp --remove-destination /etc/ssl/certs/ca-certificates.crt "$root/root/certificates.crt" 2> /dev/null || true

# A folder of its own, since what is compiled in place is nobody else's; environments are kept beside it.
rm -rf --one-file-system "$root/root/pybitmap"
tests/support/copy_tree.sh "$root/root/pybitmap"

mapfile -t handed < <(env | grep -E '^(PYTEST_ADDOPTS|PYBITMAP_[A-Z_]+|HYPOTHESIS_[A-Z_]+|PIP_[A-Z_]+|[a-z]+_proxy)=' || true)

cat > "$root/root/inside" <<'INSIDE'
# Written by system.sh. Arguments: the packages, --, the Pythons, --, what is for pytest.
set -euo pipefail
# pip keeps no second copy of what the environments have.
export DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
[ ! -e /root/certificates.crt ] || export PIP_CERT=/root/certificates.crt
packages=()
while [ "$1" != -- ]; do packages+=("$1"); shift; done
shift
if [ "${packages[*]}" != "$(cat /root/packages 2> /dev/null)" ]; then
    # A mirror may be some weeks old; debootstrap took it as well.
    apt-get update -q -o Acquire::Check-Valid-Until=false
    apt-get install -q -y --no-install-recommends "${packages[@]}"
    echo "${packages[*]}" > /root/packages
fi
cd /root/pybitmap
pythons=()
while [ "$#" -gt 0 ] && [ "$1" != -- ]; do pythons+=("$1"); shift; done
[ "$#" = 0 ] || shift
if [ "${#pythons[@]}" = 0 ]; then
    for path in /usr/bin/python3.[0-9] /usr/bin/python3.[0-9][0-9] /usr/bin/pypy3; do
        [ ! -x "$path" ] || pythons+=("$(basename "$path")")
    done
fi
more=()
for python in "${pythons[@]}"; do
    dpkg-query -W -f '${db:Status-Status}' "$python-venv" 2> /dev/null | grep -q '^installed' ||
        more+=("$python-venv" "$python-dev")
done
[ "${#more[@]}" = 0 ] || apt-get install -q -y --no-install-recommends "${more[@]}"
failed=
for python in "${pythons[@]}"; do
    echo "== $(. /etc/os-release; echo "$PRETTY_NAME"), $python: $("$python" -c 'import sys; print(sys.version.split()[0])')," \
        "$(qemu-img --version | head -n 1)"
    rm -f "/root/$python/.test"
    marker=()
    case $python in pypy*) marker=(-m core) ;; esac
    make -s PYTHON="$python" VENV="/root/$python" "/root/$python/.test" &&
        "/root/$python/bin/python" -m pytest -q "${marker[@]}" "$@" || failed+=" $python"
done
[ -z "$failed" ] || { echo "system.sh: failed with$failed" >&2; exit 1; }
INSIDE

# Not `exec chroot` at once: the first process of a PID namespace reaps what others leave.
exec "${alone[@]}" bash -c '
    mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && mount --rbind /sys "$0/sys" || exit 1
    env -i HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "${@:2:$1}" \
        chroot "$0" bash /root/inside "${@:2+$1}"
' "$root" "${#handed[@]}" "${handed[@]}" "${packages[@]}" -- "$@"
