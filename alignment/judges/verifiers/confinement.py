"""Limits that a process sets for itself before it runs a program that nobody has read.

Only the standard library is used, because `code_runner.py` loads this file by its path. Linux keeps
the limits in force until the process ends; there is no way to lift them. They protect a training
from accidents and from what policies try out. They are no sandbox against a determined attacker.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_EPERM, _ENOSYS = 1, 38
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SIGKILL = 1, 22, 38, 9
_CLONE_THREAD = 0x10000
_SIGNALS_OF_FILES = (8, 10, 15)  # commands of fcntl that let a file send a signal to any process

# System calls by number on x86-64 and on arm64: processes, programs, signals, sessions, limits,
# tracing, sockets, rights of files, mounts, kernel; then priorities, memory and queues of others.
_X86_64 = {
    "clone": 56, "clone3": 435, "fcntl": 72,
    "denied": (
        57, 58, 59, 322, 62, 200, 234, 129, 297, 424, 434, 438, 109, 112, 160, 302, 101, 310, 311,
        440, 41, 42, 44, 90, 91, 92, 93, 94, 260, 268, 452, 132, 235, 261, 280, 188, 189, 190, 161,
        155, 165, 166, 167, 272, 308, 169, 170, 164, 175, 313, 246, 320, 250, 298, 321, 323, 425,
        141, 142, 144, 203, 251, 314, 256, 279, 31, 66, 71,
    ),
}  # fmt: skip
_ARM64 = {
    "clone": 220, "clone3": 435, "fcntl": 25,
    "denied": (
        221, 281, 129, 130, 131, 138, 240, 424, 434, 438, 154, 157, 164, 261, 117, 270, 271, 440,
        198, 203, 206, 52, 53, 54, 55, 452, 88, 5, 6, 7, 51, 41, 40, 39, 224, 97, 268, 142, 161,
        170, 105, 273, 104, 294, 219, 241, 280, 282, 425,
        140, 118, 119, 122, 30, 274, 238, 239, 195, 191, 187,
    ),
}  # fmt: skip
_MACHINES: dict[str, tuple[int, dict[str, Any]]] = {
    "x86_64": (0xC000003E, _X86_64),
    "aarch64": (0xC00000B7, _ARM64),
}

# Landlock: reading, writing, creating, removing and renaming files, as far as a kernel knows them.
_ACCESS_BY_VERSION = (0x1FFE, 0x3FFE, 0x7FFE)  # versions 1, 2 and 3 and later
_READ_FILE, _READ_DIR, _WRITE_FILE = 0x4, 0x8, 0x2
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def confine(memory: int, cpu_seconds: int) -> str:
    """Confine this process: no further process, signal, socket or file that is written.

    Args:
        memory: Most bytes of address space.
        cpu_seconds: Most seconds of processor time.

    Returns:
        What this kernel cannot prevent, as a clause, or "".

    Raises:
        OSError: If this system cannot confine a process.
    """
    for limit, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),  # pipes are no files
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory),
    ):
        resource.setrlimit(limit, (most, most))
    _call("prctl", _LIBC.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0))
    _call("prctl", _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    lacking = "" if _deny_files() else "read, remove or rename files of this user"
    _deny_system_calls()
    return lacking


def _deny_files() -> bool:
    """Deny all files but those of Python and the system's libraries, which can only be read.

    Returns:
        Whether the kernel has Landlock, which does this.
    """
    version = _LIBC.syscall(444, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    access = _ACCESS_BY_VERSION[min(version, len(_ACCESS_BY_VERSION)) - 1]
    # From version 6 on signals to other processes and their abstract sockets are denied as well.
    attributes = struct.pack("QQQ", access, 0x3 if version >= 4 else 0, 0x3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _LIBC.syscall(444, attributes, ctypes.c_size_t(size), 0)
    _call("landlock_create_ruleset", rules)
    readable = {sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/etc", *sys.path}
    for path in (*filter(None, readable), *_DEVICES):
        if not os.path.exists(path):
            continue
        place = os.open(path, os.O_PATH)
        allowed = _READ_FILE | (_READ_DIR if os.path.isdir(path) else _WRITE_FILE)
        if os.path.isfile(path):  # such as python312.zip
            allowed = _READ_FILE
        rule = struct.pack("=Qi", allowed, place)
        _call("landlock_add_rule", _LIBC.syscall(445, rules, 1, rule, 0))
        os.close(place)
    _call("landlock_restrict_self", _LIBC.syscall(446, rules, 0))
    os.close(rules)
    return True


def _deny_system_calls() -> None:
    """Let system calls that reach other processes fail with EPERM, by a filter of seccomp."""
    if platform.machine() not in _MACHINES or platform.system() != "Linux":
        raise OSError(_ENOSYS, f"no limits are known for {platform.machine()}")
    architecture, calls = _MACHINES[platform.machine()]
    load, equal, any_bit, back = 0x20, 0x15, 0x45, 0x06  # of words of 32 bits
    error, allow, kill = 0x00050000, 0x7FFF0000, 0x80000000
    program = [
        (load, 0, 0, 4), (equal, 1, 0, architecture), (back, 0, 0, kill),
        (load, 0, 0, 0),
        (equal, 0, 1, calls["clone3"]), (back, 0, 0, error | _ENOSYS),  # then clone is tried
        (equal, 0, 4, calls["clone"]), (load, 0, 0, 16), (any_bit, 0, 1, _CLONE_THREAD),
        (back, 0, 0, allow), (back, 0, 0, error | _EPERM),
    ]  # fmt: skip
    program += [(equal, 0, 2 + 2 * len(_SIGNALS_OF_FILES), calls["fcntl"]), (load, 0, 0, 24)]
    for command in _SIGNALS_OF_FILES:
        program += [(equal, 0, 1, command), (back, 0, 0, error | _EPERM)]
    program.append((back, 0, 0, allow))
    if architecture == 0xC000003E:  # calls of the x32 variant have other numbers
        program.insert(4, (0x35, 0, 1, 0x40000000))
        program.insert(5, (back, 0, 0, error | _ENOSYS))
    for number in calls["denied"]:
        program += [(equal, 0, 1, number), (back, 0, 0, error | _EPERM)]
    program.append((back, 0, 0, allow))
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(buffer))
    _call("prctl", _LIBC.prctl(_PR_SET_SECCOMP, 2, header, 0, 0))


def _call(name: str, result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
