/* SPDX-License-Identifier: GPL-2.0 */
/* bcc's BPF_STACK_TRACE rounds its size with it; ours are powers of two already. */
#define roundup_pow_of_two(n) (n)
