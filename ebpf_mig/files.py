# SPDX-License-Identifier: Apache-2.0
"""Creates result files. Never overwrites a user's file or follows a symbolic link.

In: a path and whether the user said `--force`. Out: an open file descriptor, mode 0600.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ebpf_mig.errors import UsageError

_FLAGS = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_new(path: str | Path, *, force: bool = False) -> int:
    """Create `path` and return its descriptor, open for writing.

    An existing regular file is an error, or with `force` is removed first. A device or FIFO has no data
    to lose and is opened as it is. Symbolic links are refused, since root would follow them anywhere. Raises
    UsageError.
    """
    name = Path(path)
    try:
        mode = name.lstat().st_mode
        if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
            return os.open(name, _FLAGS)
        if stat.S_ISLNK(mode):
            raise UsageError(f"{path} is a symbolic link; not written", "name the file itself, or - for stdout")
        if not stat.S_ISREG(mode):
            raise UsageError(f"{path} is not a regular file; not written")
        if not force:
            raise UsageError(f"{path} exists; not overwritten", "give another name, or --force")
        name.unlink()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot replace {path}: {_why(error)}") from error
    try:
        return os.open(name, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot create {path}: {_why(error)}") from error


def _why(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
