# SPDX-License-Identifier: Apache-2.0
"""A block device that any machine has: a file behind the loop driver.

In: a path for the file. Out: the device, which the kernel removes when nobody has it open any more.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def loop_device(image: Path, size: int) -> Iterator[Path]:
    """Skips the test where there are no loop devices."""
    image.touch()
    os.truncate(image, size)
    made = subprocess.run(["losetup", "-f", "--show", image], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"missing feature: loop devices ({made.stderr.strip()})")
    try:
        yield Path(made.stdout.strip())
    finally:
        subprocess.run(["losetup", "-d", made.stdout.strip()], check=True)
