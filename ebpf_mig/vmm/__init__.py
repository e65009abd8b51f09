# SPDX-License-Identifier: Apache-2.0
"""The VMMs: a folder for each."""
