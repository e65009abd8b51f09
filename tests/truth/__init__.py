# SPDX-License-Identifier: Apache-2.0
"""The truth machine: a small VMM of our own that migrates real KVM guests with delays we know."""
