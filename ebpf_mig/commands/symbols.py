# SPDX-License-Identifier: Apache-2.0
"""`report --symbols`: names for user functions that had none when the recording was made.

In: a recording, and whether debuginfod may be asked. Out: the same recording with more names. A file is used only if
its build ID is that of the recording. A stack's other frames stay as they are.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from msgspec.structs import replace

from ebpf_mig.errors import UsageError
from ebpf_mig.linux.elf import Elf, debug_file, require_pyelftools
from ebpf_mig.recording.events import Module, UserStack
from ebpf_mig.recording.file import Recording

LOCAL, DEBUGINFOD = "local", "debuginfod"
_ASK_S = 90
_BUILD_ID = re.compile(r"[0-9a-f]{8,64}", re.ASCII)
"""A recording is untrusted, and its build IDs become parts of paths and arguments."""
_CLIENT = "debuginfod-find"


def named(recording: Recording, where: str) -> Recording:
    """`where`: LOCAL, or also DEBUGINFOD. UsageError if the client of debuginfod is missing."""
    require_pyelftools()
    if where == DEBUGINFOD and shutil.which(_CLIENT) is None:
        raise UsageError(f"{_CLIENT} is not installed", "apt-get install debuginfod, and set DEBUGINFOD_URLS")
    modules = {(e.pid, e.number): e for e in recording.events if isinstance(e, Module)}
    wanted = {
        (event.pid, number)
        for event in recording.events
        if isinstance(event, UserStack)
        for name, number in zip(event.names, event.modules, strict=False)
        if not name
    }
    by_build_id = {modules[key].build_id: modules[key] for key in sorted(wanted & modules.keys())}
    files = {
        build_id: _files(module, where) for build_id, module in by_build_id.items() if _BUILD_ID.fullmatch(build_id)
    }
    found = {key: (module.bias, files.get(module.build_id, [])) for key, module in modules.items()}
    events = [_with_names(event, found) if isinstance(event, UserStack) else event for event in recording.events]
    return replace(recording, events=events)


def _with_names(event: UserStack, found: dict[tuple[int, int], tuple[int, list[Elf]]]) -> UserStack:
    names = []
    for name, number, offset in zip(event.names, event.modules, event.offsets, strict=False):
        bias, files = found.get((event.pid, number), (0, []))
        names.append(name or next((known for one in files if (known := one.function(offset + bias))), ""))
    return replace(event, names=tuple(names))


def _files(module: Module, where: str) -> list[Elf]:
    """The files with this build ID that can have names: the debug file, debuginfod's, the program itself."""
    paths = [debug_file(module.build_id), Path(module.path)]
    found = [elf for path in paths if path is not None and (elf := _opened(path, module.build_id))]
    if where == DEBUGINFOD and (path := _asked(module.build_id)) and (elf := _opened(path, module.build_id)):
        found.insert(0, elf)
    return found


def _opened(path: Path, build_id: str) -> Elf | None:
    try:
        if not path.is_file():  # a FIFO would block
            return None
        elf = Elf(path.open("rb"))
    except (OSError, ValueError):
        return None
    return elf if elf.build_id == build_id else None


def _asked(build_id: str) -> Path | None:
    """The debug file that debuginfod's client fetched."""
    try:
        done = subprocess.run(
            [_CLIENT, "debuginfo", build_id],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ASK_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return Path(done.stdout.strip()) if done.returncode == 0 and done.stdout.strip() else None
