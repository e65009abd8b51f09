# SPDX-License-Identifier: Apache-2.0
"""Two hosts, two clocks: one recording of both. Pure."""
