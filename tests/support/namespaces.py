# SPDX-License-Identifier: MIT
"""Children that have the number of their parent: each is the first of a PID namespace of its own.

And Python does not know of them, as C forks them.
"""

from __future__ import annotations

import sys

import pytest
from peers import lacking
from support import run_python

#: getpid answers 1 in what follows, and `same(function)` says how that ends in a child that has
#: this number, too: what it answers, or the name of what it raises and its text.
_BEGIN = """
import ctypes, os, sys
libc = ctypes.PyDLL(None, use_errno=True)
NEWUSER, NEWPID = 0x10000000, 0x20000000
if libc.unshare(NEWPID) and libc.unshare(NEWUSER | NEWPID):
    sys.exit("LACKING " + os.strerror(ctypes.get_errno()))
child = os.fork()
if child:
    status = os.waitpid(child, 0)[1]
    os._exit(status and 1)

def same(function):
    if libc.unshare(NEWPID):
        sys.exit("LACKING " + os.strerror(ctypes.get_errno()))
    reader, writer = os.pipe()
    child = libc.fork()
    if not child:
        try:
            try:
                answer = function()
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            assert os.getpid() == 1
            os.write(writer, str(answer).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader, "rb") as file:
        return file.read().decode()

assert os.getpid() == 1
"""


def run_as_first(code: str) -> str:
    """What the code prints, in which there is `same`; see above. Skips where it cannot be."""
    if sys.platform != "linux":
        pytest.skip("PID namespaces are Linux's")
    if sys.implementation.name == "pypy":
        pytest.skip("PyPy does not bear a fork that it does not know of")
    try:
        return run_python(_BEGIN + code)
    except AssertionError as error:
        if "LACKING " in str(error):
            lacking(f"a PID namespace of its own: {str(error).rpartition('LACKING ')[2].strip()}")
        raise
