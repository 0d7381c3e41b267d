# SPDX-License-Identifier: MIT
"""The files of a copy: what they have to be, and how QEMU is to open them.

Whoever writes a header decides which other files QEMU opens. So headers are read by us first: a
copy may name the file over which it is listed, without a folder, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ...errors import CorruptError
from ...store.qcow2.file import File
from ...store.qcow2.image import Image
from .manifest import Copy, Repository, check_regular


def image_of(name: str, *, alone: bool = False) -> str:
    """As QEMU's programs are to open a copy, in its directory: over the files that headers name,
    which who opens it has checked (:func:`check_chain`).

    (Not with all of them named in one tree of options: QEMU takes minutes for one of some hundred.)

    :param alone: without those below
    """
    node: dict[str, object] = {"driver": "qcow2", "file": {"driver": "file", "filename": name}}
    if alone:
        node["backing"] = None
    return "json:" + json.dumps(node)


def chain_of(repository: Repository, copies: Sequence[Copy]) -> str:
    """The same, of the newest of a chain that has been checked."""
    return image_of(repository.path_of(copies[0]).name)


def check_chain(repository: Repository, copies: Sequence[Copy]) -> None:
    """Are the files of a chain there, whole by their length, and over each other as is listed? No
    content is read.

    :raises CorruptError: if not, and which
    :raises StoreError: if one cannot be read, or is open for writing
    """
    for copy, below in zip(copies, [*copies[1:], None]):
        check_copy(repository, copy, below)


def check_copy(repository: Repository, copy: Copy, below: Copy | None) -> None:
    """The same of one file.

    :param below: the copy over which it is to lie
    """
    path = repository.path_of(copy)
    nbytes = check_regular(path).st_size
    if nbytes != copy.nbytes:
        raise CorruptError(f"'{path}' has {nbytes} bytes, not {copy.nbytes}")
    size = check_image(path, None if below is None else below.file)
    if size != copy.size:
        raise CorruptError(f"'{path}' has a disk of {size} bytes, not {copy.size}")


def check_image(path: Path, backing: str | None) -> int:
    """The size of the disk in a copy's file, of which only the header is read, by us: QEMU would
    open what is named there.

    :param backing: the file over which it is to lie
    :raises CorruptError: if it is missing, or something else
    :raises StoreError: if it cannot be read
    """
    check_regular(path)
    file = File(str(path), read_only=True, lock=False)  # nobody writes to what is listed
    try:
        image = Image(file, read_only=True)
        if image.has_data_file:
            raise CorruptError(f"'{path}' has its data in another file")
        if image.is_encrypted:
            raise CorruptError(f"'{path}' is encrypted")
        named = image.backing_name
        wanted = None if backing is None else backing.encode()
        if named != wanted:
            says = "none" if named is None else f"'{named.decode('utf-8', 'backslashreplace')}'"
            raise CorruptError(f"the backing file of '{path}' is {says}, not '{backing}'")
        if wanted is not None and image.backing_format not in (None, b"qcow2"):
            raise CorruptError(f"the backing file of '{path}' is said to be no qcow2 image")
        size: int = image.size
        return size
    finally:
        file.close()
