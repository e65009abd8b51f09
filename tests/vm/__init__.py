# SPDX-License-Identifier: Apache-2.0
"""The integration suite on other kernels (emulated machines) and in other user lands (chroots): `python -m tests.vm`."""
