# SPDX-License-Identifier: Apache-2.0
"""A process that a test starts, and that ends with the test.

In: as for `subprocess.Popen`. Out: the same, but a failed assertion within its `with` kills it.
"""

from __future__ import annotations

import subprocess
from types import TracebackType
from typing import AnyStr


class Companion(subprocess.Popen[AnyStr]):
    """`Popen` waits for the process when the `with` is left, also by an exception: one that does not end by itself
    would hold a failed test until its limit of time, and then run on beside the tests that follow."""

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, value, traceback)
