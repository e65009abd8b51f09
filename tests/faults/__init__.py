# SPDX-License-Identifier: Apache-2.0
"""Kills and stops processes at random instants of real migrations: `python -m tests.faults`."""
