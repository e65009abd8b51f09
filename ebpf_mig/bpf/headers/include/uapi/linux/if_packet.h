/* SPDX-License-Identifier: GPL-2.0 */
/* bcc includes it by name and uses nothing of it: it brings its own copy of the BPF API. */
