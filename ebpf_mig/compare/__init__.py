# SPDX-License-Identifier: Apache-2.0
"""Results of many runs, and statistical tests of whether two results differ. Pure."""
