/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Registers and system call numbers. struct pt_regs is read by offset, since no kernel headers are used:
 * x86-64 arch/x86/include/asm/ptrace.h, arm64 arch/arm64/include/asm/ptrace.h; both are stable user ABI.
 */
#pragma once

struct call_args {
	u64 nr, a0, a1, a2;
};

#if defined(__x86_64__) || defined(EBPF_MIG_ARCH_X86)

#define NR_read 0
#define NR_write 1
#define NR_mmap 9
#define NR_ioctl 16
#define NR_pread64 17
#define NR_pwrite64 18
#define NR_readv 19
#define NR_writev 20
#define NR_msync 26
#define NR_mincore 27
#define NR_sendfile 40
#define NR_sendto 44
#define NR_recvfrom 45
#define NR_sendmsg 46
#define NR_recvmsg 47
#define NR_shutdown 48
#define NR_fsync 74
#define NR_fdatasync 75
#define NR_io_submit 209
#define NR_tgkill 234
#define NR_splice 275
#define NR_sync_file_range 277
#define NR_preadv 295
#define NR_pwritev 296
#define NR_preadv2 327
#define NR_pwritev2 328
#define NR_io_uring_enter 426

#define REG_FIRST_ARGUMENT 112		/* struct pt_regs: di, si, ax */
#define REG_SECOND_ARGUMENT 104
#define REG_FIFTH_ARGUMENT 72		/* r8 */
#define REG_RETURNED 80

/* dx, si, di and orig_ax are adjacent from offset 96 on; a return changes ax only. */
static __always_inline void read_args(const void *regs, struct call_args *out)
{
	u64 w[4];

	bpf_probe_read_kernel(w, sizeof(w), (const char *)regs + 96);
	out->a2 = w[0];
	out->a1 = w[1];
	out->a0 = w[2];
	out->nr = w[3];
}

#elif defined(__aarch64__) || defined(EBPF_MIG_ARCH_ARM64)

#define NR_io_submit 2
#define NR_ioctl 29
#define NR_read 63
#define NR_write 64
#define NR_readv 65
#define NR_writev 66
#define NR_pread64 67
#define NR_pwrite64 68
#define NR_preadv 69
#define NR_pwritev 70
#define NR_sendfile 71
#define NR_splice 76
#define NR_fsync 82
#define NR_fdatasync 83
#define NR_sync_file_range 84
#define NR_tgkill 131
#define NR_sendto 206
#define NR_recvfrom 207
#define NR_shutdown 210
#define NR_sendmsg 211
#define NR_recvmsg 212
#define NR_mmap 222
#define NR_msync 227
#define NR_mincore 232
#define NR_preadv2 286
#define NR_pwritev2 287
#define NR_io_uring_enter 426

#define REG_FIRST_ARGUMENT 0		/* struct pt_regs: regs[0], regs[1]; x0 is also the return value */
#define REG_SECOND_ARGUMENT 8
#define REG_FIFTH_ARGUMENT 32
#define REG_RETURNED 0

/* regs[31], sp, pc, pstate, orig_x0, syscallno: a return overwrites x0 only, orig_x0 keeps it. */
static __always_inline void read_args(const void *regs, struct call_args *out)
{
	u64 w[2], orig_x0;
	s32 nr;

	bpf_probe_read_kernel(w, sizeof(w), (const char *)regs + 8);
	bpf_probe_read_kernel(&orig_x0, sizeof(orig_x0), (const char *)regs + 272);
	bpf_probe_read_kernel(&nr, sizeof(nr), (const char *)regs + 280);
	out->a0 = orig_x0;
	out->a1 = w[0];
	out->a2 = w[1];
	out->nr = nr;
}

#else
#error "ebpf-mig knows the registers of x86-64 and arm64 only"
#endif
