# SPDX-License-Identifier: Apache-2.0
"""Counts errors of one VM, file or migration by kind, and logs the first of each. They do not end the watch.

In: exceptions, and limits that were reached. Out: counters for the metrics. Thread-safe.
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
"""Limits of `node` and `analysis_queue`. What exceeds one is left out."""
_SAID = 64
"""At most this many different messages are logged. Then errors are only counted."""

_log = logging.getLogger("ebpf_mig.exporter")


class Troubles:
    """Counters since the start, for each of `ERRORS` and `LIMITS`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors = dict.fromkeys(ERRORS, 0)
        self._limits = dict.fromkeys(LIMITS, 0)
        self._said: set[tuple[str, str]] = set()

    @contextlib.contextmanager
    def of(self, kind: str, what: str) -> Iterator[None]:
        """Counts an error in the body and goes on. PreflightError concerns the whole node, and passes."""
        try:
            yield
        except PreflightError:
            raise
        except Exception as error:  # any error: the other VMs must still be watched
            self.error(kind, what, error)

    def error(self, kind: str, what: str, error: BaseException) -> None:
        """Counts an error, and logs it if it is the first of its kind and type."""
        text = printable(f"{what}: {type(error).__name__}: {error}", 500)
        with self._lock:
            self._errors[kind] += 1
        if self._first(kind, type(error).__name__):
            _log.error("%s; further errors of this kind are only counted", text)
        _log.debug("%s", text, exc_info=error)

    def exceeded(self, limit: str, most: int) -> None:
        """Counts something that was left out because there were `most` already."""
        with self._lock:
            self._limits[limit] += 1
        if self._first(limit, "limit"):
            _log.warning("the limit of %d %s is reached; more are left out and counted", most, limit)

    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """(errors, limits) so far."""
        with self._lock:
            return dict(self._errors), dict(self._limits)

    def _first(self, kind: str, name: str) -> bool:
        with self._lock:
            if (kind, name) in self._said or len(self._said) >= _SAID:
                return False
            self._said.add((kind, name))
            return True
