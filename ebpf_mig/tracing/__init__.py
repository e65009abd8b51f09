# SPDX-License-Identifier: Apache-2.0
"""One run of the tracer on this host, and a recorder on another."""
