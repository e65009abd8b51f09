# SPDX-License-Identifier: Apache-2.0
"""Many demos and many watched migrations, each accounted for: `python -m tests.soak`."""
