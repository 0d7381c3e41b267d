# SPDX-License-Identifier: MIT
"""Starts nbdkit with our plugin: ``python -m pybitmap.integrations.nbdkit DISK --store FOLDER``.

nbdkit's Python is the system's, and finds nothing of a virtual environment. So this looks whether
that Python can load this installation, says where it is, and becomes nbdkit (exec). The plugin is
``nbdkit_plugin.py``, what it serves ``served.py``.

It makes the socket itself and hands it on as systemd does (sd_listen_fds(3)), since nbdkit's own
has whatever mode the umask leaves, and one that a killed server has left keeps the next from
starting. nbdkit stays in the foreground: in the background nobody would hear of its errors.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from ..errors import BitmapError, UnsupportedError
from ..qmp.server import listen_at
from ..trace import printable
from .served import Parameters, checked

_PLUGIN = Path(__file__).with_name("nbdkit_plugin.py")

_FIRST_HANDED_ON = 3  # SD_LISTEN_FDS_START

#: Options of nbdkit whose value may be the next word (nbdkit(1)).
_WITH_VALUE = re.compile(
    "-[DegiPptUu]|--(debug|export|export-?name|filter|group|ip-?addr|log|mask-handshake|pid-?file"
    "|port|run|selinux-label|threads|timeout|tls|tls-certificates|tls-psk|unix|user|vsock)"
)

_EPILOG = """\
The store is made if it is missing, and so are the bitmaps that are named; bitmaps that it has
record, too. Until Ctrl-C or SIGTERM, or a QMP client's quit: then the disk is synced and the
bitmaps are stored. After kill -9 no write is missed; after a crash of the system the bitmaps are
inconsistent, and starting says how to go on.

Nobody else can write to the disk meanwhile who heeds QEMU's locks, and no other server can use
the store. Without --socket, nbdkit's options say where to listen (-U, -p with -i, --run, -s).

examples:
  python -m pybitmap.integrations.nbdkit disk.raw --store disk.bitmaps --bitmap daily \\
      --socket disk.sock --qmp qmp.sock
  python -m pybitmap.integrations.nbdkit /dev/vg/disk --store disk.bitmaps \\
      --bitmap daily,granularity=4K -- -U - --run 'nbdcopy image.raw "$uri"'

exit code: 0 ended as asked; 1 an error, also if the bitmaps could not be stored; 2 wrong usage.
With --run it is the command's.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m pybitmap.integrations.nbdkit",
        usage="%(prog)s DISK --store FOLDER [options] [-- options of nbdkit]",
        description="Serve a raw disk over NBD by nbdkit, and keep dirty bitmaps of what is "
        "written to it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("disk", metavar="DISK", help="a raw file or a block device")
    parser.add_argument("--store", required=True, metavar="FOLDER", help="the local store")
    parser.add_argument("--node", metavar="NAME", help="of the disk in the store; disk")
    parser.add_argument(
        "--bitmap",
        action="append",
        default=[],
        metavar="NAME[,granularity=SIZE]",
        help="a bitmap that is to be there, repeatedly; a new one has 64K a bit",
    )
    parser.add_argument(
        "--socket", metavar="PATH", help="serve on this unix socket; only its owner can connect"
    )
    parser.add_argument(
        "--qmp", metavar="PATH", help="answer QMP on this one, as 'pybitmap serve' does"
    )
    parser.add_argument(
        "--read-only", action="store_true", help="nothing is written, the store neither"
    )
    parser.add_argument(
        "--show", action="store_true", help="print what would be run, for scripts and units"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Becomes nbdkit; returns an exit code where it does not.

    :param arguments: those of the process, if None
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    parser = _parser()
    asked, options = parser.parse_args(words[:end]), words[end + 1 :]
    if not options and asked.socket is None and not asked.show:
        parser.error("say where to listen: --socket PATH, or options of nbdkit behind --")
    try:
        parameters = ["disk=" + asked.disk, "store=" + asked.store]
        parameters += ["node=" + asked.node] if asked.node is not None else []
        parameters += ["bitmap=" + each for each in asked.bitmap]
        parameters += ["qmp=" + asked.qmp] if asked.qmp is not None else []
        parameters += ["read-only=true"] if asked.read_only else []
        wanted = Parameters.of(parameters)
        wanted.check()
        if not asked.show:
            checked(wanted)
        options, given = _parted(options)
        command = [_nbdkit(), "-f", *options]
        paths = python_paths()
        if asked.show:
            command += ["-U", os.path.abspath(asked.socket)] if asked.socket is not None else []
            command += ["python", str(_PLUGIN), *wanted.words(), *given]
            print(f"PYTHONPATH={shlex.quote(os.pathsep.join(paths))} {shlex.join(command)}")
            return 0
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        if asked.socket is not None:
            _hand_on(asked.socket, environment)
        command += ["python", str(_PLUGIN), *wanted.words(), *given]
        os.execve(command[0], command, environment)
    except (BitmapError, OSError) as error:
        of = getattr(error, "filename", None) or ""
        why = getattr(error, "strerror", None) or str(error)
        print(printable(f"pybitmap: {of}{of and ': '}{why}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pybitmap: interrupted", file=sys.stderr)
        return 130


def _parted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of nbdkit, which stand before the plugin, and the ``key=value`` of filters, which
    stand behind it.
    """
    options: list[str] = []
    given: list[str] = []
    for word in words:
        value = options and _WITH_VALUE.fullmatch(options[-1])
        (given if re.match(r"[A-Za-z][\w.-]*=", word) and not value else options).append(word)
    return options, given


def _nbdkit() -> str:
    """The path of nbdkit.

    :raises UnsupportedError: if it is missing or too old, or its plugin for Python is missing, or
        of a Python that cannot load this installation
    """
    path = shutil.which("nbdkit")
    if path is None:
        raise UnsupportedError("nbdkit is not installed (Debian: nbdkit, nbdkit-plugin-python)")
    found = subprocess.run([path, "--dump-plugin", "python"], capture_output=True, text=True)
    lines = dict(line.partition("=")[::2] for line in found.stdout.splitlines())
    theirs = lines.get("python_version", "").rsplit(".", 1)[0]
    if found.returncode or not theirs:
        raise UnsupportedError(
            "nbdkit has no plugin for Python (Debian: nbdkit-plugin-python); it says: "
            + (found.stderr.strip() or "nothing")
        )
    if lines.get("has_cleanup") != "1":  # what is called last, since 1.28
        raise UnsupportedError("nbdkit is too old: this needs 1.28 or later")
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    if sys.implementation.name != "cpython" or theirs != ours:
        raise UnsupportedError(
            f"nbdkit's plugin has CPython {theirs}, and this is {sys.implementation.name} {ours}, "
            f"whose packages that cannot load: install pybitmap for python{theirs} (python{theirs} "
            "-m venv FOLDER), and start it from there"
        )
    return path


def python_paths() -> list[str]:
    """What another Python of this version needs in its PYTHONPATH to import this package.

    >>> import pybitmap
    >>> str(Path(pybitmap.__file__).parents[1]) in python_paths()
    True
    """
    backend = import_module("_cffi_backend").__file__  # all of cffi that is needed to run
    folders = [str(Path(__file__).parents[2]), str(Path(backend or "").parent)]
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [each for each in dict.fromkeys([*folders, *before]) if each]


def _hand_on(path: str, environment: dict[str, str]) -> None:
    """Listen on a socket that is the first descriptor handed on to whom this process becomes.

    :raises OSError: if it cannot be made, as when another program listens there
    """
    listener, _ = listen_at(path)
    fd = listener.detach()
    if fd != _FIRST_HANDED_ON:
        os.dup2(fd, _FIRST_HANDED_ON)
        os.close(fd)
    os.set_inheritable(_FIRST_HANDED_ON, True)
    environment.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")


if __name__ == "__main__":
    sys.exit(main())
