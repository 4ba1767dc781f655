"""The system call filter (seccomp BPF) of tested code: a list of what is refused, for x86-64 and AArch64.

Refused calls fail with EPERM, so that Python raises PermissionError and the program goes on. What belongs to another
architecture or to the x32 numbering kills the process. New threads pass; new processes and programs do not.
"""

from __future__ import annotations

import struct

# name: (x86-64, AArch64), None where the architecture has no such call
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "pidfd_send_signal": (424, 424),
    # new processes and programs
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # namespaces, mounts, roots
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "swapon": (167, 224), "swapoff": (168, 225),
    # network: no socket at all; socketpair is filtered by family below
    "socket": (41, 198), "bind": (49, 200), "connect": (42, 203),
    # memory and state that outlive a process or escape its limits
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "shmctl": (31, 195), "semget": (64, 190), "semctl": (66, 191), "semop": (65, 193), "semtimedop": (220, 192),
    "msgget": (68, 186), "msgctl": (71, 187), "msgsnd": (69, 189), "msgrcv": (70, 188), "mq_open": (240, 180),
    "mq_unlink": (241, 181), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # surface of the kernel that no program here needs
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "personality": (135, 92), "modify_ldt": (154, None), "uselib": (134, None),
    "iopl": (172, None), "ioperm": (173, None), "syslog": (103, 116), "acct": (163, 89), "reboot": (169, 142),
    "vhangup": (153, 58), "sethostname": (170, 161), "setdomainname": (171, 162), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171), "splice": (275, 76),
    "vmsplice": (278, 75), "tee": (276, 77),
}  # fmt: skip

_OF_THE_WORKER = {"unshare", "setns", "mount", "umount2", "pidfd_open"}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_SOCKETPAIR = {"x86_64": 53, "aarch64": 199}
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_NAMESPACES = 0x7E020000 | 0x80  # every CLONE_NEW…
_CLONE_THREAD = 0x00010000
_AF_UNIX = 1

_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_EPERM, _ENOSYS = 0x00050000 | 1, 0x00050000 | 38
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, little-endian


def has_filter(machine: str) -> bool:
    """Whether the calls of this architecture are known."""
    return machine in _ARCHITECTURE


def worker_filter(machine: str) -> bytes:
    """What a worker refuses itself, and so every process that it forks; installed once, for a filter costs 0.3 ms."""
    unix_only = [
        _line(_EQUAL, _SOCKETPAIR[machine], 0, 4),
        _line(_LOAD, _FIRST_ARGUMENT),
        _line(_EQUAL, _AF_UNIX, 1, 0),
        _line(_RETURN, _EPERM),
        _line(_RETURN, _ALLOW),
    ]
    return _program(machine, set(REFUSED) - _OF_THE_WORKER, unix_only)


def room_filter(machine: str) -> bytes:
    """What tested code is refused on top of that: all that a worker itself needs to make a room."""
    threads_only = [
        _line(_EQUAL, _CLONE3, 0, 1),
        _line(_RETURN, _ENOSYS),  # its flags are out of reach of a filter: libc falls back to clone
        _line(_EQUAL, _CLONE[machine], 0, 5),
        _line(_LOAD, _FIRST_ARGUMENT),
        _line(_ANY_BIT, _NAMESPACES, 1, 0),
        _line(_ANY_BIT, _CLONE_THREAD, 1, 0),
        _line(_RETURN, _EPERM),
        _line(_RETURN, _ALLOW),
    ]
    return _program(machine, _OF_THE_WORKER, threads_only)


def _program(machine: str, refused: set[str], rules: list[bytes]) -> bytes:
    """Instructions for `kernel.set_filter`: the architecture, the rules, then the refused numbers one by one."""
    column = 0 if machine == "x86_64" else 1
    lines = [
        _line(_LOAD, _ARCH),
        _line(_EQUAL, _ARCHITECTURE[machine], 1, 0),
        _line(_RETURN, _KILL),
        _line(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":
        lines += [_line(_AT_LEAST, 0x40000000, 0, 1), _line(_RETURN, _KILL)]  # x32
    lines += rules
    numbers = sorted(number for name in refused if (number := REFUSED[name][column]) is not None)
    for place, number in enumerate(numbers):
        lines.append(_line(_EQUAL, number, len(numbers) - place, 0))
    return b"".join([*lines, _line(_RETURN, _ALLOW), _line(_RETURN, _EPERM)])


def _line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
