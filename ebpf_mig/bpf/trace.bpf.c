// SPDX-License-Identifier: GPL-2.0
/*
 * All programs that trace a migration. The source of each signal is chosen before compilation. KVM_FUNCTIONS and
 * SOCKET_FUNCTIONS select the signals that come from kernel functions (from_functions.bpf.c); SOCKET_FUNCTIONS also
 * selects the kinds of probes. The others come from system calls (from_syscalls.bpf.c).
 */
#include "kvm.h"
#include "sockets.h"
#include "file_calls.h"
#include "io_submit.h"
#include "uring.bpf.c"
#include "aio_sync.bpf.c"
#include "sched.bpf.c"
#include "lock.bpf.c"
#include "stack_sampler.bpf.c"
#include "tcp.bpf.c"
#include "exec.bpf.c"
#include "inside_kvm.bpf.c"
#if !KVM_FUNCTIONS || !SOCKET_FUNCTIONS
#include "from_syscalls.bpf.c"
#endif
#if !SOCKET_FUNCTIONS
#include "untracked_sends.bpf.c"
#endif
#if KVM_FUNCTIONS || SOCKET_FUNCTIONS
#include "from_functions.bpf.c"
#endif
