"""Giving up the right to write outside a folder, by Linux's Landlock; it needs no privilege and cannot be taken back.

What it holds: this process and all that it starts can create, write, truncate, rename, link and remove nothing outside the
folder, and (from Linux 6.12 on) can signal no process outside. What it does not hold: reading, the network, memory and
processor time, and the change of modes, owners and times of files of one's own.
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on all architectures
VERSION, PATH_BENEATH, NO_NEW_PRIVILEGES = 1, 1, 38
WRITE_FILE, TRUNCATE, SIGNALS = 1 << 1, 1 << 14, 1 << 1
# Removing folders and files, making those of any kind; moving between folders and truncating came with versions 2 and 3.
CHANGES = WRITE_FILE | sum(1 << bit for bit in range(4, 13))
BY_VERSION = {1: CHANGES, 2: CHANGES | 1 << 13}


def version() -> int:
    """The version of Landlock here; 0 where there is none."""
    try:
        return max(0, _library().syscall(CREATE_RULESET, None, ctypes.c_size_t(0), VERSION))
    except (OSError, AttributeError):
        return 0


def confine(folder: Path) -> None:
    """From now on this process and its children write only below `folder`, and to /dev/null.

    Raises
    ------
    OSError
        the system has no Landlock
    """
    found = version()
    if not found:
        raise OSError("this system cannot confine a process to a folder (Linux with Landlock can)")
    rights = BY_VERSION.get(found, CHANGES | 1 << 13 | TRUNCATE)
    attributes = struct.pack("=QQQ", rights, 0, SIGNALS if found >= 6 else 0)
    size = 24 if found >= 6 else 16 if found >= 4 else 8
    ruleset = _checked(CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    _allow(ruleset, folder, rights)
    _allow(ruleset, Path("/dev/null"), rights & (WRITE_FILE | TRUNCATE))
    if _library().prctl(NO_NEW_PRIVILEGES, *map(ctypes.c_ulong, (1, 0, 0, 0))):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    _checked(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _checked(ADD_RULE, ruleset, PATH_BENEATH, struct.pack("=Qi", rights, place), 0)
    finally:
        os.close(place)


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(number: int, *arguments: object) -> int:
    result = _library().syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
