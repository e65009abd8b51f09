# SPDX-License-Identifier: Apache-2.0
"""Errors and limits: each is counted, each kind is logged once, and only those of the whole node are raised."""

from __future__ import annotations

import logging

import pytest
from prometheus_client.exposition import generate_latest

from ebpf_mig.errors import PreflightError
from ebpf_mig.exporter.metrics import Metrics
from ebpf_mig.exporter.troubles import ERRORS, LIMITS, Troubles
from tests.unit.exporter.observations import status


def test_every_error_is_counted_and_each_kind_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    troubles = Troubles()
    with caplog.at_level(logging.WARNING):
        for number in range(100):
            with troubles.of("vm", f"process {number}\n\x1b[2J"):
                raise KeyError(number)
            troubles.exceeded("traced", 256)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all(message.isprintable() for message in said)
    assert "process 0" in said[0] and "KeyError" in said[0] and "256 traced" in said[1]
    errors, limits = troubles.counts()
    assert errors == dict.fromkeys(ERRORS, 0) | {"vm": 100} and limits == dict.fromkeys(LIMITS, 0) | {"traced": 100}
    metrics = Metrics()
    metrics.status(status(errors=errors, limits=limits))
    text = generate_latest(metrics.registry).decode()
    assert 'ebpf_mig_errors_total{kind="vm"} 100.0' in text
    assert 'ebpf_mig_limit_exceeded_total{limit="traced"} 100.0' in text


def test_what_concerns_the_whole_node_passes() -> None:
    troubles = Troubles()
    with pytest.raises(PreflightError), troubles.of("vm", "process 1"):
        raise PreflightError("cannot attach")
    assert not any(troubles.counts()[0].values())
