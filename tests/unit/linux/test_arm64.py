# SPDX-License-Identifier: Apache-2.0
"""arm64 without an arm64 machine: our numbers and offsets beside Linux's own headers and an arm64 kernel's BTF.

Witnesses: the kernel's UAPI headers (Debian's linux-libc-dev and linux-libc-dev-arm64-cross), evaluated by gcc, and the
BTF of Debian's arm64 kernel, which `python -m tests.vm arm64` puts into the cache. bcc builds the programs for arm64,
and the reading of registers is executed, on registers laid out as those headers say.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from ebpf_mig.linux import bpf, btf, kvm
from ebpf_mig.probes import source
from ebpf_mig.probes.hook_points import FUNCTIONS
from ebpf_mig.probes.macros import OFFSETS
from tests.conftest import requires
from tests.vm.catalogue import arm64_btf

BPF = source.BPF_DIR
HEADERS = {"arm64": Path("/usr/aarch64-linux-gnu/include"), "x86": Path("/usr/include")}
X86_ASM = Path("/usr/include/x86_64-linux-gnu")
REGISTERS = 8 * 34
"""Bytes of struct user_pt_regs (31 registers, sp, pc, pstate), which struct pt_regs begins with."""


def need_headers(architecture: str) -> None:
    """Skips the test where there is no gcc, or no kernel header of that architecture."""
    if shutil.which("gcc") is None:
        pytest.skip("missing feature: gcc")
    if not (HEADERS[architecture] / "linux/kvm.h").exists():
        pytest.skip("missing feature: kernel headers (linux-libc-dev, linux-libc-dev-arm64-cross)")


def evaluate(architecture: str, header: str, expressions: dict[str, str]) -> dict[str, int]:
    """Constants of a kernel header of that architecture, as gcc computes them."""
    need_headers(architecture)
    search = [f"-I{HEADERS[architecture]}"] + ([f"-I{X86_ASM}"] if architecture == "x86" else [])
    text = f"#include <linux/stddef.h>\n#include <{header}>\n"
    text += "".join(f"const unsigned long v_{name} = {value};\n" for name, value in expressions.items())
    done = subprocess.run(
        ["gcc", "-nostdinc", *search, "-x", "c", "-S", "-o", "-", "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # `.zero 8` is how a zero is written.
    found = re.findall(r"^v_(\w+):\n\s+\.(quad|zero)\s+(-?\d+)", done.stdout, re.MULTILINE)
    return {name: int(value) if how == "quad" else 0 for name, how, value in found}


def branch(architecture: str) -> dict[str, int]:
    """The system call numbers of one branch of arch.h."""
    text = (BPF / "arch.h").read_text()
    part = text.split("EBPF_MIG_ARCH_ARM64")[1 if architecture == "arm64" else 0]
    return {name: int(number) for name, number in re.findall(r"^#define NR_(\w+) (\d+)", part, re.MULTILINE)}


@pytest.mark.parametrize("architecture", ["arm64", "x86"])
def test_system_calls_have_the_kernels_numbers(architecture: str) -> None:
    ours = branch(architecture)
    assert {"ioctl", "sendmsg", "recvmsg", "tgkill", "write"} <= ours.keys()
    assert evaluate(architecture, "asm/unistd.h", {name: f"__NR_{name}" for name in ours}) == ours
    machine = {"arm64": "aarch64", "x86": "x86_64"}[architecture]
    assert evaluate(architecture, "asm/unistd.h", {"bpf": "__NR_bpf"})["bpf"] == bpf.SYS_BPF[machine]


@pytest.mark.parametrize("architecture", ["arm64", "x86"])
def test_the_ioctls_that_programs_look_for_have_the_kernels_numbers(architecture: str) -> None:
    names = [name for name, value in vars(kvm).items() if name.isupper() and isinstance(value, int) and value > 0xFFF]
    need_headers(architecture)
    known = defined(architecture, names)
    ours = {name: getattr(kvm, name) for name in names if name in known}
    assert {"RUN", "GET_DIRTY_LOG", "CLEAR_DIRTY_LOG", "RESET_DIRTY_RINGS", "SET_CLOCK"} <= ours.keys()
    assert evaluate(architecture, "linux/kvm.h", {name: f"KVM_{name}" for name in ours}) == ours


@pytest.mark.parametrize("architecture", ["arm64", "x86"])
def test_every_named_ioctl_is_named_as_the_kernel_names_it(architecture: str) -> None:
    names = set(kvm._BY_NUMBER.values()) | set(kvm._SHARED.values())
    values = evaluate(architecture, "linux/kvm.h", {name: f"KVM_{name}" for name in defined(architecture, names)})
    assert len(values) > 40
    assert {name: kvm.name_of(value) for name, value in values.items() if kvm.name_of(value) != name} == {}


def defined(architecture: str, names: list[str] | set[str]) -> list[str]:
    """Only names that the headers have. Old headers lack the newest; those of arm64 lack x86's structures."""
    general = HEADERS[architecture] / "linux/kvm.h"
    special = (HEADERS[architecture] if architecture == "arm64" else X86_ASM) / "asm/kvm.h"
    text = "".join(path.read_text() for path in (general, special) if path.exists())
    found = []
    for name in sorted(names):
        definition = re.search(rf"^#define KVM_{name}\s(?:.*\\\n)*.*", text, re.MULTILINE)
        types = re.findall(r"struct (\w+)", definition.group(0)) if definition else ["-"]
        if all(re.search(rf"^struct {name} {{", text, re.MULTILINE) for name in types):
            found.append(name)
    return found


def test_user_registers_lie_where_the_programs_read_them() -> None:
    layout = {"x1": "__builtin_offsetof(struct user_pt_regs, regs[1])", "size": "sizeof(struct user_pt_regs)"}
    assert evaluate("arm64", "asm/ptrace.h", layout) == {"x1": 8, "size": REGISTERS}


def test_an_arm64_kernel_has_every_structure_that_programs_read() -> None:
    if not arm64_btf().exists():
        pytest.skip("missing feature: BTF of an arm64 kernel (python -m tests.vm arm64)")
    blob = str(arm64_btf())
    registers = btf.offsets(blob, [("pt_regs", "regs"), ("pt_regs", "orig_x0"), ("pt_regs", "syscallno")])
    assert list(registers.values()) == [0, REGISTERS, REGISTERS + 8]
    wanted = [*OFFSETS.values(), ("kvm", "mmu_lock"), ("kvm", "slots_lock"), ("task_struct", "__state")]
    found = btf.offsets(blob, wanted)
    assert [member for member in wanted if found[member] is None] == []


def test_an_arm64_kernel_has_the_functions_that_are_hooked() -> None:
    """They have as many arguments as the programs assume: the returned value follows them. KVM is built in there."""
    if not arm64_btf().exists():
        pytest.skip("missing feature: BTF of an arm64 kernel (python -m tests.vm arm64)")
    names = {name.replace("__x64_sys_", "__arm64_sys_") for function in FUNCTIONS for name in function.names}
    found = btf.functions(str(arm64_btf()), names)
    for function in FUNCTIONS:
        there = [found.get(name.replace("__x64_sys_", "__arm64_sys_")) for name in function.names]
        known = [one for one in there if one is not None]
        assert known or function.one_of, function.names
        assert not any(one.module for one in known)
        assert not function.arguments or {one.arguments for one in known} == {function.arguments}
    assert {"kvm_flush_remote_tlbs", "kvm_flush_remote_tlbs_memslot"} & found.keys()


def built_for_arm64(script: str) -> str:
    """Runs Python in a process whose bcc builds for arm64; its output."""
    done = subprocess.run(
        ["env", "ARCH=arm64", sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@requires("root", "bcc", "kernel BTF")
def test_programs_are_built_for_arm64() -> None:
    """Each function has code, and reads the system call's number where arm64 keeps it, not where x86-64 does."""
    said = built_for_arm64(
        "import os, struct\n"
        "from ebpf_mig.probes import hook, loader, tiers\n"
        "from ebpf_mig.probes.macros import defines\n"
        "from ebpf_mig.probes.records import CONTRACT\n"
        "present = {'sched_switch', 'contention_begin', 'contention_end', 'tcp_probe'}\n"
        "macros = defines([os.getpid()], present)\n"
        "program = loader.Program('trace.bpf.c', macros, CONTRACT)\n"
        "for name in ('on_sys_enter', 'on_sys_exit', 'on_sched_switch', 'on_contention_end', 'on_tcp_probe'):\n"
        "    code = program._bpf.dump_func(name.encode())\n"
        "    adds = {i for op, _, _, i in struct.iter_unpack('<BBhi', code) if op == 0x07}\n"
        "    print(name, len(code), 280 in adds, 96 in adds - set(macros.values()))\n"
        "sends = (hook.Hook('kprobe', 'inet_sendmsg', 'on_send_kprobe', ('socket',)),)\n"
        "choice = tiers.Choice(sends, frozenset({'kvm', 'socket', 'split'}))\n"
        "program = loader.Program('trace.bpf.c', defines([os.getpid()], present, choice), CONTRACT)\n"
        "for name in ('on_kvm_ioctl', 'on_kvm_ioctl_kretprobe', 'on_send_kprobe', 'on_tgkill', 'on_flushed'):\n"
        "    code = program._bpf.dump_func(name.encode())\n"
        "    adds = {i for op, _, _, i in struct.iter_unpack('<BBhi', code) if op == 0x07}\n"
        "    print(name, len(code), 280 in adds, 80 in adds or 112 in adds)\n"
        "from ebpf_mig.probes import trigger\n"
        "print('node', loader.Program('trigger.bpf.c', {'OFF_skc_num': 14}, trigger.CONTRACT) is not None)\n"
    )
    lines = dict(line.split(" ", 1) for line in said.splitlines())
    assert lines["node"] == "True"
    assert all(lines[name].endswith("True False") for name in ("on_sys_enter", "on_sys_exit")), said
    assert all(lines[name].endswith("True False") for name in ("on_kvm_ioctl", "on_tgkill", "on_send_kprobe")), said
    assert lines["on_kvm_ioctl_kretprobe"].endswith("False False"), said
    assert all(int(lines[name].split()[0]) > 0 for name in lines if name != "node")


EXECUTE = """
import ctypes, os
from ebpf_mig.probes import source
import bcc
os.environ["BCC_KERNEL_SOURCE"] = str(source.HEADERS)
image = bytes.fromhex({image!r})
text = '#include <linux/types.h>\\n' + source.source_text("arch.h") + '''
struct image {{ u64 words[64]; }};
BPF_ARRAY(image, struct image, 1);
BPF_ARRAY(found, struct call_args, 1);
int on_sys_enter(void *ctx)
{{
    int zero = 0;
    struct image *regs = image.lookup(&zero);
    struct call_args args = {{}};

    if (!regs)
        return 0;
    read_args(regs, &args);
    found.update(&zero, &args);
    return 0;
}}
'''
os.chdir("/")
bpf = bcc.BPF(text=text.encode(), cflags=["-w"])
leaf = bpf["image"].Leaf()
ctypes.memmove(ctypes.byref(leaf), image, len(image))
bpf["image"][ctypes.c_int(0)] = leaf
bpf.attach_raw_tracepoint(tp=b"sys_enter", fn_name=b"on_sys_enter")
os.getppid()
bpf.detach_raw_tracepoint(tp=b"sys_enter")
args = bpf["found"][ctypes.c_int(0)]
print(args.nr, args.a0, args.a1, args.a2)
"""


@requires("root", "bcc", "kernel BTF")
def test_the_reading_of_arm64_registers_is_right_when_executed() -> None:
    """An ioctl(7, KVM_RUN, 3) that has returned -4: x0 is overwritten, orig_x0 and syscallno are not."""
    x0, orig_x0, number, unused = -4, 7, branch("arm64")["ioctl"], 0xDEAD
    registers = struct.pack("<q33Q", x0, kvm.RUN, 3, *range(100, 131))
    assert len(registers) == REGISTERS
    image = registers + struct.pack("<QiI", orig_x0, number, unused)
    assert built_for_arm64(EXECUTE.format(image=image.hex())).split() == ["29", "7", str(kvm.RUN), "3"]
