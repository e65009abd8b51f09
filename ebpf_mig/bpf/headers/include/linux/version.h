/* SPDX-License-Identifier: GPL-2.0 */
/* Kernels since 5.0 do not check a program's version; none of our programs depends on it. */
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 10, 0)
