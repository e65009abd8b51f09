# SPDX-License-Identifier: Apache-2.0
"""libvirt: migrations through its API, and two hosts of our own to try them."""
