/* SPDX-License-Identifier: GPL-2.0 */
/* bcc looks for this file to recognise a kernel tree, and its prelude wants CONFIG_BPF_SYSCALL. */
#ifndef EBPF_MIG_KCONFIG_H
#define EBPF_MIG_KCONFIG_H
#define CONFIG_BPF_SYSCALL 1
#endif
