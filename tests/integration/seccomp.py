# SPDX-License-Identifier: Apache-2.0
"""Applies a seccomp profile of a container runtime to a command: `python seccomp.py PROFILE COMMAND...`.

In: a profile in the OCI format, as runc and crun read it. Out: COMMAND, under a real filter that libseccomp makes.
Like the runtimes, it leaves out system calls that the machine does not have. Needs root, or no_new_privs.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

_ERRNO, _ALLOW = 0x00050000, 0x7FFF0000
_COMPARE = {"SCMP_CMP_EQ": 4, "SCMP_CMP_MASKED_EQ": 7}
"""Values of seccomp.h, libseccomp 2.5."""
_UNKNOWN = -1


class _Argument(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = [
        ("index", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    ]


def _action(rule: dict[str, Any], errno: int) -> int:
    return {"SCMP_ACT_ALLOW": _ALLOW, "SCMP_ACT_ERRNO": _ERRNO | rule.get("errnoRet", errno)}[rule["action"]]


def _compared(one: dict[str, Any]) -> _Argument:
    """OCI: for a masked comparison `value` is the mask, and `valueTwo` is what must remain."""
    return _Argument(one["index"], _COMPARE[one["op"]], one["value"], one.get("valueTwo", 0))


def apply(profile: dict[str, Any]) -> None:
    """Filters this process for good, with the rules of `profile`."""
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    errno = profile.get("defaultErrnoRet", 1)
    context = ctypes.c_void_p(library.seccomp_init(_action({"action": profile["defaultAction"]}, errno)))
    for rule in profile["syscalls"]:
        arguments = [_compared(one) for one in rule.get("args", ())]
        for name in rule["names"]:
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number == _UNKNOWN:
                continue
            action = _action(rule, errno)
            array = (_Argument * len(arguments))(*arguments)
            code = library.seccomp_rule_add_array(context, ctypes.c_uint32(action), number, len(arguments), array)
            assert code == 0, f"{name}: {os.strerror(-code)}"
    code = library.seccomp_load(context)
    assert code == 0, os.strerror(-code)


if __name__ == "__main__":
    apply(json.loads(Path(sys.argv[1]).read_text()))
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606
