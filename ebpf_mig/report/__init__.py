# SPDX-License-Identifier: Apache-2.0
"""A breakdown as text, JSON, CSV, HTML or Perfetto trace. Pure."""
