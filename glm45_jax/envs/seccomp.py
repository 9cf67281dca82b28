"""The system calls that a confined program does not get, as a BPF program for bwrap's `--seccomp`.

Everything that no honest program of a task needs and that has let programs out before: other
processes' memory, new namespaces and mounts, keys, BPF, io_uring, modules, clocks, and every
socket family but unix, IP and netlink (AF_VSOCK reaches a hypervisor; no namespace covers it).
"""

from __future__ import annotations

import platform
import struct

EPERM, ENOSYS = 1, 38

# name: numbers on x86_64 and aarch64; None where it does not exist.
DENIED: dict[str, tuple[int | None, int | None]] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "syslog": (103, 116),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "iopl": (172, None),
    "ioperm": (173, None),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "personality": (135, 92),
    "vhangup": (153, 58),
    "lookup_dcookie": (212, 18),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "mbind": (237, 235),
    "fanotify_init": (300, 262),
}
CLONE, CLONE3, IOCTL, SOCKET = (56, 220), (435, 435), (16, 29), (41, 198)
SOCKETPAIR = (53, 199)
NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: type on a terminal
FAMILIES = (1, 2, 10, 16)  # unix, IPv4, IPv6, netlink (getaddrinfo asks it)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
X32 = 0x40000000

_LOAD, _JEQ, _JGE, _JSET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH = 0, 4  # offsets in struct seccomp_data


def program(machine: str | None = None) -> bytes:
    """The filter for a machine ("x86_64", "aarch64"; None for this one), as struct sock_filter[].

    Raises: ValueError for another machine.
    """
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise ValueError(f"no system call numbers for {machine}; known: {sorted(ARCHITECTURES)}")
    column, audit = ARCHITECTURES[machine]
    code = [
        (_LOAD, 0, 0, _ARCH),
        (_JEQ, 1, 0, audit),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        *((_JGE, 0, 1, X32), (_RETURN, 0, 0, _ERRNO | ENOSYS)),
    ]
    for numbers in DENIED.values():
        if (number := numbers[column]) is not None:
            code += [(_JEQ, 0, 1, number), (_RETURN, 0, 0, _ERRNO | EPERM)]
    # Its flags lie in memory, where a filter cannot look; without it, libraries use clone.
    code += [(_JEQ, 0, 1, CLONE3[column]), (_RETURN, 0, 0, _ERRNO | ENOSYS)]
    code += _on_argument(CLONE[column], 0, [(_JSET, 0, 1, NEW_NAMESPACES)])
    code += _on_argument(IOCTL[column], 1, [(_JEQ, 0, 1, request) for request in TERMINAL_INPUT])
    for number in (SOCKET[column], SOCKETPAIR[column]):
        code += _only(number, FAMILIES)
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def _argument(index: int) -> int:
    """Offset of the lower half of an argument, on a little-endian machine."""
    return 16 + 8 * index


def _on_argument(number: int, index: int, tests: list[tuple[int, int, int, int]]) -> list:
    """Refuses call `number` where a test (each skips one line if false) holds of an argument."""
    body = [(_LOAD, 0, 0, _argument(index))]
    for test in tests:
        body += [test, (_RETURN, 0, 0, _ERRNO | EPERM)]
    body.append((_LOAD, 0, 0, _NUMBER))
    return [(_JEQ, 0, len(body), number), *body]


def _only(number: int, allowed: tuple[int, ...]) -> list:
    """Refuses call `number` unless its first argument is one of `allowed`."""
    body = [(_LOAD, 0, 0, _argument(0))]
    body += [(_JEQ, len(allowed) - at, 0, value) for at, value in enumerate(allowed)]
    body += [(_RETURN, 0, 0, _ERRNO | EPERM), (_LOAD, 0, 0, _NUMBER)]
    return [(_JEQ, 0, len(body), number), *body]
