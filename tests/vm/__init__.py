# SPDX-License-Identifier: Apache-2.0
"""The integration suite in other kernels (emulated machines) and user lands (chroots): `python -m tests.vm`."""
