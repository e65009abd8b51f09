# SPDX-License-Identifier: Apache-2.0
"""The kernel's interfaces: KVM, BPF, perf, BTF, /proc, capabilities, processes."""
