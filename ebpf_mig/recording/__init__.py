# SPDX-License-Identifier: Apache-2.0
"""Recordings: the events, their registry, the file format, reading, writing, redaction."""
