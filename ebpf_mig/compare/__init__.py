# SPDX-License-Identifier: Apache-2.0
"""Results of many runs, and whether two of them differ. Pure."""
