# SPDX-License-Identifier: Apache-2.0
"""Firecracker: its processes are recognised."""
