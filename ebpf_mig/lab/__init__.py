# SPDX-License-Identifier: Apache-2.0
"""What demo, bench and tests need: guests, processes and hosts that end with us."""
