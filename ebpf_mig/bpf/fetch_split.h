/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Splits the time of a dirty-log ioctl by the functions that it calls. No hooked function runs per page or per word
 * of the bitmap.
 *
 * kvm_get_dirty_log_protect and kvm_clear_dirty_log_protect (virt/kvm/kvm_main.c, Linux 5.10 to 7.2) call
 * kvm_arch_sync_dirty_log, walk the bitmap under mmu_lock, and flush if anything was protected. A GET copies the
 * bitmap out last. So the walk (with the scan of the bitmap) is the time from sync to flush, and the copy is the
 * time from flush to return. With manual protection a GET only copies. A GET without a flush scanned and copied a
 * clean log. The boundary between the two is then unknown, so neither is counted. Waits are excluded from all parts.
 */
#pragma once

#include "common.h"

#define SPLIT_UNSURE 3			/* a walk if a flush follows, otherwise unknown */

static __always_inline u64 idle_in_call(struct thread_state *s)
{
	return s->off_call + s->spin_ns;
}

static __always_inline void begin_part(struct thread_state *s, u32 part, u64 now)
{
	s->part = part + 1;
	s->part_since = now;
	s->part_idle = idle_in_call(s);
}

static __always_inline void end_part(struct thread_state *s, u64 now)
{
	u64 part = s->part, took = now - s->part_since, idle = idle_in_call(s) - s->part_idle;

	s->part = 0;
	if (!part || part > SPLIT_COPY + 1)
		return;
	took = took > idle ? took - idle : 0;
	if (part == SPLIT_WALK + 1)
		s->split_ns[SPLIT_WALK] += took;
	else if (part == SPLIT_FLUSH + 1)
		s->split_ns[SPLIT_FLUSH] += took;
	else
		s->split_ns[SPLIT_COPY] += took;
}

/* Whether a GET of this VM does not write-protect pages: `manual_dirty_log_protect` of struct kvm. */
static __always_inline bool only_copies(struct thread_state *s)
{
	u32 manual = 0;

	if (OFF_kvm_manual == OFF_NONE)
		return false;
	bpf_probe_read_kernel(&manual, sizeof(manual),
			      (void *)(read_u64(file_of(s->a0), OFF_file_private) + OFF_kvm_manual));
	return manual != 0;
}

static __always_inline void split_synced(struct thread_state *s, u64 now)
{
	if ((u32)s->a1 == KVM_CLEAR_DIRTY_LOG)
		begin_part(s, SPLIT_WALK, now);
	else if ((u32)s->a1 == KVM_GET_DIRTY_LOG)
		begin_part(s, only_copies(s) ? SPLIT_COPY : SPLIT_UNSURE, now);
}

static __always_inline void split_flush(struct thread_state *s, u64 now)
{
	if (s->part == SPLIT_UNSURE + 1)
		s->part = SPLIT_WALK + 1;
	end_part(s, now);
	begin_part(s, SPLIT_FLUSH, now);
}

static __always_inline void split_flushed(struct thread_state *s, u64 now)
{
	end_part(s, now);
	if ((u32)s->a1 == KVM_GET_DIRTY_LOG)
		begin_part(s, SPLIT_COPY, now);
}
