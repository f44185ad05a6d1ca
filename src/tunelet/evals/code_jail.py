"""The child process that confines itself and then runs one program: a script of its own, which imports no tunelet.

Not the parent's side, and not what the walls promise: both are in code_run.py. Arguments: descriptor to answer on,
seconds of CPU, megabytes, walls to put up, walls that must stand (both with commas). Standard input: a secret, a line
break, the program. Answers in JSON lines: what walls stand, then the secret with the verdict.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import sysconfig
import types

KERNEL, LANDLOCK, HOOK = "seccomp", "landlock", "hook"
WHY_CHARACTERS = 300

# System calls that are refused: by x86_64's number and by aarch64's, where "None" has no such call. Left out is what
# takes a privilege (dropped before) or writes through a descriptor that can't be had.
_DENIED: dict[str, tuple[int, int | None]] = {
    # other processes, and threads: nothing to count, nothing to leave running
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "kcmp": (312, 272), "setsid": (112, 157), "setpgid": (109, 154),
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "ioprio_set": (251, 30), "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # the limits and the walls themselves
    "setrlimit": (160, 164), "prlimit64": (302, 261), "prctl": (157, 167), "seccomp": (317, 277),
    "unshare": (272, 97), "setns": (308, 268), "personality": (135, 92),
    # the network, and what outlives a process
    "socket": (41, 198), "socketpair": (53, 199), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
    "mq_open": (240, 180), "memfd_create": (319, 279), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "io_setup": (206, 0), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    # changes to files; opening one to write is refused by its flags
    "creat": (85, None), "truncate": (76, 45), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "mknod": (133, None),
    "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}  # fmt: skip
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_OPENS = (((2, None), 1), ((257, 56), 2))  # open and openat, and the argument that holds the flags
_FCNTL, _FCNTL_COMMANDS = (72, 25), (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals to others by a detour
_NEW = 424  # from here on numbers are the same everywhere: io_uring, clone3, pidfd_*, mounts; C libraries fall back
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def filter_program(machine: str) -> bytes:
    """The seccomp filter for `machine` as an array of struct sock_filter. KeyError for an unknown architecture."""
    arm = machine == "aarch64"
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, absent = 0x7FFF0000, 0x80000000, 0x50000 | 1, 0x50000 | 38  # EPERM, ENOSYS
    code = [(load, 0, 0, 4), (equal, 1, 0, _ARCHITECTURES[machine]), (answer, 0, 0, kill), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, _NEW), (answer, 0, 0, absent)]
    for numbers in _DENIED.values():
        if (number := numbers[arm]) is not None:
            code += [(equal, 0, 1, number), (answer, 0, 0, refuse)]
    for numbers, place in _OPENS:
        if (number := numbers[arm]) is not None:
            code += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * place), (any_bit, 0, 1, _WRITES)]
            code += [(answer, 0, 0, refuse), (answer, 0, 0, allow)]
    code += [(equal, 0, 2 + 2 * len(_FCNTL_COMMANDS), _FCNTL[arm]), (load, 0, 0, 16 + 8)]
    for command in _FCNTL_COMMANDS:
        code += [(equal, 0, 1, command), (answer, 0, 0, refuse)]
    code += [(answer, 0, 0, allow), (answer, 0, 0, allow)]
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def put_up_kernel(libc: ctypes.CDLL) -> bool:
    """Seccomp; whether it stands."""
    machine = os.uname().machine
    if machine not in _ARCHITECTURES:
        return False
    code = filter_program(machine)
    held = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(held)))
    return libc.prctl(22, 2, program, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def put_up_landlock(libc: ctypes.CDLL) -> bool:
    """Landlock: no file but the standard library's and the system's libraries can be read; whether it stands."""
    create, add, restrict = 444, 445, 446
    version = libc.syscall(create, None, 0, 1)
    if version < 1:
        return False
    files = (1 << (13 if version == 1 else 14 if version == 2 else 15 if version < 5 else 16)) - 1
    network, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = libc.syscall(create, struct.pack("=QQQ", files, network, scopes)[:size], size, 0)
    if ruleset < 0:
        return False
    for path in readable():
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # not every system has each of them
        access = (1 << 2) | (1 << 3 if os.path.isdir(path) else 0)  # READ_FILE, READ_DIR
        libc.syscall(add, ruleset, 1, struct.pack("=Qi", access, place), 0)
        os.close(place)
    stands = libc.syscall(restrict, ruleset, 0) == 0
    os.close(ruleset)
    return stands


def readable() -> list[str]:
    """What a program must be able to read to import the standard library."""
    own = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), os.path.join(sys.base_prefix, "lib")}
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/localtime", "/etc/ld.so.cache"]
    return [*sorted(own), *system, "/dev/null", "/dev/urandom"]


def put_up_hook() -> bool:
    """Python's own events: what a program asks for in the ordinary way is refused by name, on any system."""
    refused = ("os.", "socket.", "subprocess.", "shutil.", "ctypes.dl", "ctypes.call", "resource.", "pty.", "signal.p")
    # read-only or of this process alone
    harmless = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr", "os.listxattr", "socket.gethostname")
    roots = tuple(os.path.realpath(path) + os.sep for path in readable())

    def hook(event: str, given: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = given
            writes = isinstance(flags, int) and flags & _WRITES
            inside = isinstance(path, (str, bytes)) and (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(roots)
            if writes or not inside:
                raise PermissionError(f"a program under test can't open {path!r}")
        elif event.startswith(refused) and event not in harmless:
            raise PermissionError(f"a program under test can't use {event}")

    sys.addaudithook(hook)
    return True


def limit(seconds: int, megabytes: int) -> None:
    """CPU, memory, and no files, processes or core dumps."""
    limits = {"CPU": seconds, "AS": megabytes * 2**20, "FSIZE": 0, "NPROC": 0, "NOFILE": 64, "CORE": 0}
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def confine(wanted: list[str]) -> list[str]:
    """Put up these walls; those that stand."""
    standing = []
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: dies with its parent
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24))  # root has no privilege left, and owns its files
        if LANDLOCK in wanted and put_up_landlock(libc):
            standing.append(LANDLOCK)
        if KERNEL in wanted and put_up_kernel(libc):
            standing.append(KERNEL)
    if HOOK in wanted and put_up_hook():
        standing.append(HOOK)
    return standing


def main() -> None:
    answer_on, seconds, megabytes = map(int, sys.argv[1:4])
    wanted, required = (argument.split(",") if argument else [] for argument in sys.argv[4:6])
    secret, _, program = sys.stdin.buffer.read().partition(b"\n")
    os.dup2(1, 0)  # the parent's /dev/null: a program that waits for input gets none
    limit(seconds, megabytes)
    standing = confine(wanted)

    def say(**what: object) -> None:
        os.write(answer_on, json.dumps(what).encode() + b"\n")

    say(walls=standing)
    if not set(required) <= set(standing):
        os._exit(1)
    module = sys.modules["program"] = types.ModuleType("program")  # dataclasses look their module up
    sys.argv[:] = ["program"]
    why = ""
    try:
        exec(compile(program.decode(), "<program>", "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        why = "it ended itself before its tests were through"
    except BaseException as error:  # a verdict whatever it was: a program may raise anything
        why = f"{type(error).__name__}: {error}".strip(": \n")
    say(secret=secret.decode(), passed=not why, why=why[:WHY_CHARACTERS])
    os._exit(0)


if __name__ == "__main__":
    main()
