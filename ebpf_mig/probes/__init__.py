# SPDX-License-Identifier: Apache-2.0
"""The Python half of the BPF programs."""
