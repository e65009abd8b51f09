// SPDX-License-Identifier: Apache-2.0
/*
 * Preloaded into Cloud Hypervisor where KVM cannot save nested state: it asks for it whatever the CPU has, and a refusal
 * fails the migration after the pause. An empty state is the truth for a guest that runs no guests of its own.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/kvm.h>
#include <stdarg.h>

int ioctl(int fd, unsigned long request, ...)
{
	static int (*next)(int, unsigned long, void *);
	va_list rest;
	void *argument;
	int result;

	va_start(rest, request);
	argument = va_arg(rest, void *);
	va_end(rest);
	if (!next)
		next = (int (*)(int, unsigned long, void *))dlsym(RTLD_NEXT, "ioctl");
	result = next(fd, request, argument);
	if (result < 0 && errno == EINVAL && (unsigned int)request == (unsigned int)KVM_GET_NESTED_STATE) {
		((struct kvm_nested_state *)argument)->size = sizeof(struct kvm_nested_state);
		return 0;
	}
	return result;
}
