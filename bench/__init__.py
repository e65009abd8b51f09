# SPDX-License-Identifier: Apache-2.0
"""Measurements behind the figures in docs/. Run one with `python -m bench.NAME`."""
