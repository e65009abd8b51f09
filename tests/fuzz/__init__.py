# SPDX-License-Identifier: Apache-2.0
"""Fuzzing of everything that takes untrusted input: `python -m tests.fuzz --seconds 60`."""
