# SPDX-License-Identifier: Apache-2.0
"""Cloud Hypervisor, by its HTTP API."""
