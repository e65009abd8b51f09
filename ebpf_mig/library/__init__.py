# SPDX-License-Identifier: Apache-2.0
"""The Python library: a recording as an object, its events and figures as tables. `ebpf_mig` exports it."""
