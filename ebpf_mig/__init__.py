# SPDX-License-Identifier: Apache-2.0
"""ebpf-mig: where the downtime of a live migration goes, as the kernel saw it."""

__version__ = "0.1.0"
