/* SPDX-License-Identifier: GPL-2.0 */
/* The loader passes the machine's page size; bcc sizes ring buffers in pages. */
#ifndef EBPF_MIG_PAGE_H
#define EBPF_MIG_PAGE_H
#define PAGE_SIZE EBPF_MIG_PAGE_SIZE
#endif
