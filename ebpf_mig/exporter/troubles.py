# SPDX-License-Identifier: Apache-2.0
"""What goes wrong for one VM, one file or one migration: counted by kind, said once, never the end of the watch.

In: exceptions, and limits that were met. Out: counters for the metrics. Safe for threads.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from ebpf_mig.errors import PreflightError
from ebpf_mig.text import printable

ERRORS = ("vm", "events", "recording", "state", "analysis")
"""`vm`: a VM could not be looked at or traced; `events`: a batch of events could not be sorted; `recording`: one could
not be kept; `state`: the state directory cannot be read; `analysis`: no breakdown could be made."""
LIMITS = ("vms", "traced", "new-processes", "queue")
"""What exceeded a limit of `node` or `analysis_queue` and was left out."""
_SAID = 64
"""Different messages in the log, at most; then only the counters go on."""

_log = logging.getLogger("ebpf_mig.exporter")


class Troubles:
    """Counters since the start, one for each of `ERRORS` and `LIMITS`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors = dict.fromkeys(ERRORS, 0)
        self._limits = dict.fromkeys(LIMITS, 0)
        self._said: set[tuple[str, str]] = set()

    @contextlib.contextmanager
    def of(self, kind: str, what: str) -> Iterator[None]:
        """An error in here costs what is done in here and nothing else. PreflightError, the whole node's, passes."""
        try:
            yield
        except PreflightError:
            raise
        except Exception as error:  # whatever it is: the other VMs are still to be watched
            self.error(kind, what, error)

    def error(self, kind: str, what: str, error: BaseException) -> None:
        """Counts an error and says it, the first of its kind and type."""
        text = printable(f"{what}: {type(error).__name__}: {error}", 500)
        with self._lock:
            self._errors[kind] += 1
        if self._first(kind, type(error).__name__):
            _log.error("%s; further errors of this kind are only counted", text)
        _log.debug("%s", text, exc_info=error)

    def exceeded(self, limit: str, most: int) -> None:
        """Counts one that was left out because there were `most` already."""
        with self._lock:
            self._limits[limit] += 1
        if self._first(limit, "limit"):
            _log.warning("the limit of %d %s is reached; what exceeds it is left out and counted", most, limit)

    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """(errors, limits) up to now."""
        with self._lock:
            return dict(self._errors), dict(self._limits)

    def _first(self, kind: str, name: str) -> bool:
        with self._lock:
            if (kind, name) in self._said or len(self._said) >= _SAID:
                return False
            self._said.add((kind, name))
            return True
