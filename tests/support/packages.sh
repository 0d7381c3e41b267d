#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# `packages.sh FOLDER [PYTHON...]`: builds the source archive, and from it the wheel of each Python, into a new
# folder; $BIN is where the tools of the extra `package` are. The same files give the same bytes, whatever the folder,
# the time and the umask (check_packages.py compares). What makes it so: sources from git alone, SOURCE_DATE_EPOCH, no
# debug information (it has paths), and not the linker's options of who built the Python (it may have a RUNPATH).
set -euo pipefail
folder=${1:?where to?}
shift
here=$(cd "$(dirname "$0")" && pwd)
BIN=$(cd "${BIN:?}" && pwd)
umask 022
mkdir "$folder"
folder=$(cd "$folder" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$here/copy_tree.sh" "$work/source"
# The time of the last commit, else what zip archives have at the earliest.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$here" log -1 --format=%ct 2> /dev/null || echo 315532800)}
export SOURCE_DATE_EPOCH
export CFLAGS="${CFLAGS:-} -g0"
if [ "$(uname -s)" = Linux ]; then
    export LDSHARED="${CC:-cc} -shared -Wl,-s"
fi

"$BIN/python" -m build --sdist --outdir "$work" "$work/source" > "$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
mv "$work"/*.tar.gz "$folder"
for python in "${@:-$BIN/python}"; do
    path=$(command -v "$python") || { echo "packages.sh: there is no $python" >&2; exit 1; }
    "$BIN/python" -m pip --python "$path" -q wheel --no-deps --no-cache-dir --wheel-dir "$work/wheels" "$folder"/*.tar.gz
done
for wheel in "$work"/wheels/*.whl; do
    if [ "$(uname -s)" = Linux ]; then
        PATH="$BIN:$PATH" "$BIN/auditwheel" repair --wheel-dir "$folder" "$wheel"
    else
        mv "$wheel" "$folder"
    fi
done
ls -l "$folder"
