// SPDX-License-Identifier: GPL-2.0
/*
 * All that traces a migration. Where the signals come from is chosen before this is compiled: KVM_FUNCTIONS and
 * SOCKET_FUNCTIONS say which are taken from kernel functions (functions.h), the latter also by which probes; the others
 * come from system calls (calls.h).
 */
#include "kvm.h"
#include "sockets.h"
#include "waits.h"
#include "sampling.h"
#include "wire.h"
#if !KVM_FUNCTIONS || !SOCKET_FUNCTIONS
#include "calls.h"
#endif
#if !SOCKET_FUNCTIONS
#include "hidden.h"
#endif
#if KVM_FUNCTIONS || SOCKET_FUNCTIONS
#include "functions.h"
#endif
