# SPDX-License-Identifier: Apache-2.0
"""Watches all VMs of a node, and serves each migration's figures to Prometheus."""
