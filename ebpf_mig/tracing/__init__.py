# SPDX-License-Identifier: Apache-2.0
"""A tracing session on this host, and a recorder on another host."""
