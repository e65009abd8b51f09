# SPDX-License-Identifier: Apache-2.0
"""Makes the parts of a breakdown from the events of one host or of one merged timeline. Pure."""
