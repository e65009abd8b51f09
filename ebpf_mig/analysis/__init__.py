# SPDX-License-Identifier: Apache-2.0
"""From the events of one host, or of one merged timeline, to the parts of a breakdown. Pure."""
