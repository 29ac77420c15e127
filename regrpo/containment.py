"""Walls around the calling process that untrusted Python code cannot take down, set by the kernel.

- Landlock (Linux 5.13): files outside given folders cannot be opened; nothing can be written,
  made, linked or removed anywhere.
- seccomp: system calls outside a list fail with EPERM. The list holds what computing needs:
  memory, time, and reading files. Not in it: processes and threads, programs, sockets, signals,
  pipes, tracing, mounts, users, limits, io_uring.
- Limits on memory and processor time.

All of it holds for a process without privileges and for root, and cannot be undone.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Sequence
from pathlib import Path

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # landlock_*, on every architecture
_READ = 1 << 2 | 1 << 3  # READ_FILE, READ_DIR
# Rights on files that each version of Landlock's interface knows: 13 bits, then one more each.
_FILE_BITS = {1: 13, 2: 14, 3: 15, 4: 15}
_EPERM = 1

# Names and numbers of the permitted calls (asm/unistd_64.h; asm-generic/unistd.h for aarch64).
_X86_64 = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "lseek": 8,
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
    "rt_sigreturn": 15, "pread64": 17, "readv": 19, "writev": 20, "access": 21, "sched_yield": 24,
    "mremap": 25, "madvise": 28, "nanosleep": 35, "getpid": 39, "exit": 60, "uname": 63,
    "getcwd": 79, "readlink": 89, "gettimeofday": 96, "getrusage": 98, "sysinfo": 99, "times": 100,
    "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "sigaltstack": 131,
    "gettid": 186, "futex": 202, "sched_getaffinity": 204, "getdents64": 217, "clock_gettime": 228,
    "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "openat": 257,
    "newfstatat": 262, "readlinkat": 267, "faccessat": 269, "getrandom": 318, "membarrier": 324,
    "statx": 332, "rseq": 334, "faccessat2": 439,
}  # fmt: skip
_AARCH64 = {
    "getcwd": 17, "faccessat": 48, "openat": 56, "close": 57, "getdents64": 61, "lseek": 62,
    "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "readlinkat": 78,
    "newfstatat": 79, "fstat": 80, "exit": 93, "exit_group": 94, "futex": 98, "nanosleep": 101,
    "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123,
    "sched_yield": 124, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135,
    "rt_sigreturn": 139, "times": 153, "uname": 160, "getrusage": 165, "gettimeofday": 169,
    "getpid": 172, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178,
    "sysinfo": 179, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226,
    "madvise": 233, "getrandom": 278, "membarrier": 283, "statx": 291, "rseq": 293,
    "faccessat2": 439,
}  # fmt: skip
_SYSCALLS = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}


class ContainmentError(RuntimeError):
    """The system has no such walls; the message says what is missing."""


def why_not_contained() -> str | None:
    """Why this system cannot contain code; None where it can."""
    if platform.system() != "Linux":
        return f"the system is {platform.system()}; containing code needs Linux"
    if platform.machine() not in _SYSCALLS:
        return f"the machine is {platform.machine()}; expected one of {', '.join(_SYSCALLS)}"
    if _landlock_version() < 1:
        return "the kernel has no Landlock (Linux 5.13 or newer, with landlock among its modules)"
    return None


def contain(readable: Sequence[Path], *, memory_bytes: int, cpu_s: int) -> None:
    """Sets the walls around this process, for good.

    Args:
        readable: folders whose files may be read.

    Raises:
        ContainmentError: they could not be set.
    """
    reason = why_not_contained()
    if reason is not None:
        raise ContainmentError(reason)
    for kind, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),  # soft and hard are the same: the kernel kills
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    libc = ctypes.CDLL(None, use_errno=True)
    _require(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _restrict_files(libc, readable)
    _restrict_calls(libc)


def _require(result: int, what: str) -> int:
    if result < 0:
        raise ContainmentError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _landlock_version() -> int:
    return int(ctypes.CDLL(None, use_errno=True).syscall(_CREATE_RULESET, None, 0, 1))


def _restrict_files(libc: ctypes.CDLL, readable: Sequence[Path]) -> None:
    version = _landlock_version()
    files = (1 << _FILE_BITS.get(version, 16)) - 1
    # Binding and connecting TCP, and abstract sockets and signals to processes outside, where the
    # kernel knows them; seccomp forbids all of these anyway.
    attributes = struct.pack("=Q", files)
    if version >= 4:
        attributes += struct.pack("=Q", 0b11)
    if version >= 6:
        attributes += struct.pack("=Q", 0b11)
    ruleset = _require(
        libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0), "landlock_create_ruleset"
    )
    for folder in readable:
        fd = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", _READ, fd)
        _require(libc.syscall(_ADD_RULE, ruleset, 1, rule, 0), f"landlock_add_rule {folder}")
        os.close(fd)
    _require(libc.syscall(_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _restrict_calls(libc: ctypes.CDLL) -> None:
    architecture, permitted = _SYSCALLS[platform.machine()]
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    kill, refuse, allow = 0x80000000, 0x00050000 | _EPERM, 0x7FFF0000
    program = [
        (load, 0, 0, 4),  # the architecture; another one has other numbers
        (equal, 1, 0, architecture),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # the number
    ]
    for number in sorted(permitted.values()):
        program += [(equal, 0, 1, number), (give, 0, 0, allow)]
    program.append((give, 0, 0, refuse))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *row) for row in program))
    header = _Program(len(program), ctypes.addressof(code))
    _require(
        libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(header), 0, 0), "seccomp"
    )
