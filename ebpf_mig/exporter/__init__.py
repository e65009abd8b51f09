# SPDX-License-Identifier: Apache-2.0
"""The node's watch over all its VMs, and the Prometheus exporter that serves what it finds."""
