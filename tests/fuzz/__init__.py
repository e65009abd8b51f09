# SPDX-License-Identifier: Apache-2.0
"""Fuzzing of everything that others can hand us: `python -m tests.fuzz --seconds 60`."""
