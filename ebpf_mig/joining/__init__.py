# SPDX-License-Identifier: Apache-2.0
"""Joins the recordings of two hosts, each with its own clock, into one. Pure."""
