// SPDX-License-Identifier: GPL-2.0
/*
 * All that traces a migration. Where the signals come from is chosen before this is compiled: KVM_FUNCTIONS and
 * SOCKET_FUNCTIONS say which are taken from kernel functions (from_functions.bpf.c), the latter also by which probes;
 * the others come from system calls (from_syscalls.bpf.c).
 */
#include "kvm.h"
#include "sockets.h"
#include "sched.bpf.c"
#include "lock.bpf.c"
#include "stack_sampler.bpf.c"
#include "tcp.bpf.c"
#if !KVM_FUNCTIONS || !SOCKET_FUNCTIONS
#include "from_syscalls.bpf.c"
#endif
#if !SOCKET_FUNCTIONS
#include "untracked_sends.bpf.c"
#endif
#if KVM_FUNCTIONS || SOCKET_FUNCTIONS
#include "from_functions.bpf.c"
#endif
