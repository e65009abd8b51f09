# SPDX-License-Identifier: Apache-2.0
"""Measurements whose results are in docs/. Each module is a command: `python -m bench.NAME`."""
