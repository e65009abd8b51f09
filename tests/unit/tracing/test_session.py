# SPDX-License-Identifier: Apache-2.0
"""Signals while records are handed over by a C callback: none is lost."""

from __future__ import annotations

import ctypes
import signal

import pytest

from ebpf_mig.tracing.session import held_signals


def test_a_signal_within_a_c_callback_is_delivered_afterwards() -> None:
    """If it is not held back, the exception is lost inside the callback and the caller never sees it."""
    callback = ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), held_signals() as deliver:
        callback()
        survived = True
        deliver()
    assert survived


def test_what_came_last_is_delivered_on_leaving_and_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), held_signals():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with held_signals() as deliver:
            signal.raise_signal(signal.SIGHUP)
            deliver()
    finally:
        signal.signal(signal.SIGHUP, before)
