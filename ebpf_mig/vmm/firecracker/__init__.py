# SPDX-License-Identifier: Apache-2.0
"""Firecracker: a VM is handed over by a snapshot that another process loads."""
