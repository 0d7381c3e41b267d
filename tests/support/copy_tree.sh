#!/bin/sh
# SPDX-License-Identifier: MIT
# `copy_tree.sh FOLDER`: a new folder with what git has of this project, as it lies here (changed or
# not), and what is new and not ignored; none of what was built or left behind. Without git (in an
# unpacked source archive): all but what is built. Modes are 644 and 755, whatever the umask.
set -eu
folder=${1:?where to?}
umask 022
mkdir -p "$(dirname "$folder")"
mkdir "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/../.."

listed() {
    if git ls-files --error-unmatch Makefile > /dev/null 2>&1; then
        git ls-files -z --cached --others --exclude-standard
    else
        find . -name __pycache__ -prune -o -path ./build -prune -o -path ./dist -prune -o -path './.?*' -prune \
            -o -type f ! -name '*.so' ! -path './*.egg-info/*' -print0
    fi
}

# What was deleted here is still listed.
listed | xargs -0 sh -c 'for file; do [ ! -e "$file" ] || printf "%s\0" "$file"; done' sh |
    tar -c --null -T - -f "$folder.tar"
tar -x -f "$folder.tar" -C "$folder"
rm "$folder.tar"
chmod -R u=rwX,go=rX "$folder"
