# SPDX-License-Identifier: Apache-2.0
"""The truth machine: a small VMM that migrates real KVM guests with known delays."""
