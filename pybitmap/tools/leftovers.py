# SPDX-License-Identifier: MIT
"""Names of what is made for a while, in QEMU and in a folder, that say whose it is.

Whoever is killed leaves it behind; the next run is to remove it, but neither what a run beside it
works with, nor what is another user's. So a name has the machine and the user, the boot, the
process and when that began: the process can be looked for.

::

    pybitmap-41bb0f1c-5e0c9d21-f0000000-1234-88cd-5920173840288351
             machine, boot,    pids of, pid, start, random: nobody else
             user              (Linux)              has made it before
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import uuid
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from secrets import randbits

_NAME = re.compile(r"pybitmap-([0-9a-f]+)-([0-9a-f]+)-([0-9a-f]+)-([0-9]+)-([0-9a-f]+)-[0-9]+")


def new_name() -> str:
    """Of this process, and no other thing's."""
    pid = os.getpid()
    return f"pybitmap-{_machine()}-{_boot()}-{_space()}-{pid}-{_start(pid)}-{randbits(63)}"


def is_left(name: str) -> bool:
    """Was it made by this user's process, here, which has ended?

    False also where that cannot be known, as in another container.
    """
    found = _NAME.fullmatch(name)
    if found is None or found[1] != _machine():
        return False
    if found[2] != _boot():
        return True
    if found[3] != _space():
        return False
    try:
        return _start(int(found[4])) != found[5]
    except (ProcessLookupError, FileNotFoundError):
        return True
    except (OSError, OverflowError):
        return False


class Folder:
    """A folder of one's own for a while, in the place for temporary files.

    :meth:`remove` may be called twice, and where it was not made.
    """

    def __init__(self) -> None:
        self.name = new_name()
        self.path = Path(tempfile.gettempdir(), self.name)

    def make(self) -> None:
        """Together with this, what other processes of this user have left there goes.

        :raises OSError: if it cannot be made
        """
        sweep()
        self.path.mkdir(0o700)

    def give(self, path: Path, user: int | None) -> None:
        """Let another user have a file in it, if that is to be and this one may.

        :raises OSError: if it fails
        """
        if user not in (None, 0, os.geteuid()) and os.geteuid() == 0:
            os.chown(path, int(user or 0), -1)
            self.path.chmod(0o711)  # still this user's, who removes it

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def sweep() -> None:
    """Remove the folders of processes that have ended."""
    with suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            if is_left(entry.name) and _is_own_folder(entry.path):
                shutil.rmtree(entry.path, ignore_errors=True)


def _is_own_folder(path: str) -> bool:
    with suppress(OSError):
        status = os.lstat(path)
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return False


def _machine() -> str:
    """Of this machine, and this user of it."""
    known = str(uuid.getnode())
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with suppress(OSError, UnicodeDecodeError):
            known = Path(path).read_text().strip() or known
            break
    return sha256(f"{known} {os.getuid()}".encode()).hexdigest()[:8]


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    return "0"


def _space() -> str:
    """In which a pid means a process."""
    with suppress(OSError):
        return f"{os.stat('/proc/self/ns/pid').st_ino:x}"
    return "0"


def _start(pid: int) -> str:
    """When a process began: a pid is given to another one later.

    :raises OSError: if there is none
    """
    if not os.path.exists("/proc/self/stat"):
        os.kill(pid, 0)
        return "0"
    # The second field is the program's name, in parentheses, which it may have itself.
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    if fields[0] in ("Z", "X"):  # ended, and not waited for
        raise ProcessLookupError(pid)
    return f"{int(fields[19]):x}"
