"""Programs that try to get out of their box, or to use more than it has.

Each prints ESCAPED where it got through. `ends` are the statuses that it may end with; a limit that
the kernel and the watch race for has two.
"""

from __future__ import annotations

import dataclasses

from glm45_jax.envs.sandbox import Limits

LIMITS = Limits(
    cpu_s=1.0,
    memory=64 * 2**20,
    address_space=2**30,
    processes=16,
    disk=4 * 2**20,
    files=200,
    open_files=64,
    output=100_000,
)
LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"


@dataclasses.dataclass(frozen=True)
class Hostile:
    """name, Python code with {host}, {port}, {pid}, {secret} of the host's, and how it may end."""

    name: str
    code: str
    ends: tuple[str, ...] = ("ok", "failed")
    stdin: bytes = b""

    @property
    def limits(self) -> Limits:
        """Of wall time, much for those that need it only where the machine is busy."""
        return dataclasses.replace(LIMITS, wall_s=2.0 if "time" in self.ends else 30.0)


def tries(name: str, *attacks: str, before: str = "import os") -> Hostile:
    """A program whose attacks must all raise, or give something false."""
    lines = [before]
    for attack in attacks:
        lines.append(f"try:\n    if ({attack}): print('ESCAPED', {attack!r})\nexcept OSError: pass")
    return Hostile(name, "\n".join([*lines, "print('tried')"]), ("ok",))


def call(name: str, *attacks: str) -> Hostile:
    """A program of system calls that must all fail."""
    return tries(name, *(f"{attack} >= 0" for attack in attacks), before=LIBC)


# Bombs are bounded: where a limit fails they stop at hundreds of processes, and the host lives.
FORKS = 9  # doublings
THREADS = 200

OVER = (
    Hostile(
        "fork bomb",
        "import os, time\nfor _ in range({forks}):\n try: os.fork()\n except OSError: pass\n"
        "while True:\n"
        " try:\n  if not os.fork(): os._exit(0)\n except OSError: pass\n"
        " try: os.wait()\n except OSError: pass",
        ("time", "cpu"),
    ),
    Hostile(
        "many processes",
        "import os, time\nn = 0\ntry:\n while n < {threads}:\n  if not os.fork(): time.sleep(60)\n"
        "  n += 1\nexcept OSError: pass\n"
        "print('ESCAPED' if n > 16 else n, flush=True)\nos._exit(0)",
        ("ok",),
    ),
    Hostile(
        "thread bomb",
        "import threading, time, os\nn = 0\ntry:\n"
        " while n < {threads}:\n"
        "  threading.Thread(target=time.sleep, args=(9,), daemon=True).start(); n += 1\n"
        "except RuntimeError: pass\nprint('ESCAPED' if n > 16 else n, flush=True)\nos._exit(0)",
    ),
    Hostile("memory bomb", "x = []\nwhile True: x.append(bytearray(2**20))", ("memory",)),
    Hostile(
        "memory bomb of many",
        "import os, time\nfor _ in range(8):\n if not os.fork():\n"
        "  x = b'x' * (20 * 2**20); time.sleep(9)\ntime.sleep(9)",
        ("memory",),
    ),
    Hostile(
        "mmap bomb",
        "import mmap\nm = mmap.mmap(-1, 2**29)\nfor i in range(0, 2**29, 4096): m[i] = 1",
        ("memory",),
    ),
    Hostile("address space", "import mmap\nmmap.mmap(-1, 2**40)\nprint('ESCAPED')", ("failed",)),
    Hostile(
        "memfd bomb",
        "import os\nfd = os.memfd_create('x')\n"
        "while True: os.pwrite(fd, b'x' * 2**20, os.fstat(fd).st_size)",
        ("memory", "failed"),
    ),
    Hostile(
        "shared memory bomb",
        "f = open('/dev/shm/x', 'wb', 0)\nn = 0\ntry:\n while True: n += f.write(b'x' * 2**16)\n"
        "except OSError: print('ESCAPED' if n > 2**22 else n)",
        ("ok",),
    ),
    Hostile(
        "disk fill",
        "n = 0\ntry:\n for i in range(100):\n  with open(f'{{i}}', 'wb', 0) as f:\n"
        "   for _ in range(10): n += f.write(b'x' * 2**18)\n"
        "except OSError: print('ESCAPED' if n > 2**22 else n)",
        ("ok",),
    ),
    Hostile("huge sparse file", "open('x', 'wb').truncate(2**40)\nprint('ESCAPED')", ("failed",)),
    Hostile(
        "file flood",
        "i = 0\nwhile True: open(f'{{i}}', 'w').close(); i += 1",
        ("files",),
    ),
    Hostile(
        "deep folders",
        "import os\nwhile True: os.mkdir('d'); os.chdir('d')",
        ("files",),
    ),
    Hostile("infinite output", "while True: print('x' * 9999)", ("output",)),
    Hostile("infinite errors", "import sys\nwhile True: sys.stderr.write('x' * 9999)", ("output",)),
    Hostile("sleep", "import time\ntime.sleep(99)", ("time",)),
    Hostile(
        "deaf to signals",
        "import signal, time\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n"
        " except (OSError, ValueError): pass\ntime.sleep(99)",
        ("time",),
    ),
    Hostile(
        "deaf and busy in native code",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nsum(range(10**12))",
        ("cpu", "time"),
    ),
    Hostile("regex without end", "import re\nre.match('(a*)*b', 'a' * 40)", ("cpu", "time")),
    Hostile(
        "closed stdout", "import os\nos.close(1); os.close(2)\nwhile True: pass", ("cpu", "time")
    ),
    Hostile(
        "deep recursion",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1) + [n].__len__()\nf(0)",
        ("failed", "memory", "cpu"),
    ),
    Hostile(
        "open files",
        "import os\nn = 0\ntry:\n while True: os.open('/dev/null', 0); n += 1\n"
        "except OSError: print('ESCAPED' if n > 64 else n)",
        ("ok",),
    ),
    Hostile(
        "pipes full of bytes",
        "import os, fcntl\nfor _ in range(30):\n r, w = os.pipe(); os.set_blocking(w, False)\n"
        " try:\n  fcntl.fcntl(w, 1031, 2**20)\n  os.write(w, b'x' * 2**20)\n except OSError: pass",
        ("ok", "failed", "memory"),
    ),
    Hostile(
        "huge arguments",
        "import os\nos.execv('/bin/true', ['true'] + ['x' * 10**5] * 100)",
        ("failed",),
    ),
    Hostile("stdin unread", "print('done')", ("ok",), stdin=b"x" * 2**21),
    Hostile(
        "stdin closed", "import os, time\nos.close(0); time.sleep(.2)", ("ok",), stdin=b"x" * 2**21
    ),
)

LEFT_BEHIND = (
    Hostile(
        "zombies",
        "import os\nn = 0\ntry:\n while n < 99:\n  if not os.fork(): os._exit(0)\n  n += 1\n"
        "except OSError: pass\nprint('ESCAPED' if n > 16 else n)",
        ("ok",),
    ),
    Hostile(
        "daemon",
        "import os, time\nif os.fork(): os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)\n"
        "for f in (0, 1, 2): os.close(f)\ntime.sleep(60)",
        ("ok",),
    ),
    Hostile(
        "daemon that holds stdout",
        "import os, signal, time\nif os.fork(): os._exit(0)\nos.setsid()\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)",
        ("ok",),
    ),
    Hostile(
        "core dump",
        "import os\npid = os.fork()\nif not pid: os.abort()\nos.waitpid(pid, 0)\n"
        "print('ESCAPED' if [n for n in os.listdir('.') if 'core' in n] else 'none')",
        ("ok",),
    ),
    Hostile("crash", LIBC + "ctypes.string_at(0)", ("failed",)),
    Hostile(
        "SysV shared memory",
        LIBC + "i = libc.shmget(0x47, 2**20, 0o1600)\nprint(i, libc.shmat(i, None, 0))",
        ("ok",),
    ),
)

REACH = (
    tries(
        "write outside",
        *(f"open({path!r}, 'w')" for path in ("/x", "/usr/x", "/etc/x", "/dev/x", "/bin/sh")),
        "os.mkdir('/y')",
        "os.chmod('/usr/bin', 0o777) is None",
        "os.chown('/tmp', 0, 0) is None",
        "os.remove('/.files.tar') is None",
    ),
    tries(
        "host's loopback",
        "socket.create_connection(('127.0.0.1', {port}), timeout=.3)",
        "socket.create_connection(('::1', {port}), timeout=.3)",
        before="import socket",
    ),
    tries(
        "internet",
        "socket.create_connection(('1.1.1.1', 53), timeout=.3)",
        "socket.getaddrinfo('example.com', 80)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))",
        before="import socket",
    ),
    tries(
        "sockets of other kinds",
        "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
        *(
            f"socket.socket({family}, {kind})"
            for family, kind in ((17, 3), (40, 1), (38, 5), (15, 3))
        ),
        before="import socket",
    ),
    tries(
        "host's unix sockets",
        "[socket.socket(1).connect('\\0{secret}')]",
        "[socket.socket(1).connect('{host}.socket')]",
        "[socket.socket(1).connect('/var/run/docker.sock')]",
        before="import socket",
    ),
    tries(
        "host's files",
        *(
            f"open({path!r}).read()"
            for path in ("{host}", "/etc/passwd", "/etc/shadow", "/etc/hostname")
        ),
        "os.listdir('/home')",
        "os.listdir('/root/.ssh')",
        "os.listdir('/sys')",
    ),
    Hostile(
        "host's environment",
        "import glob, os\nfound = '{secret}' in str(os.environ)\n"
        "for path in glob.glob('/proc/*/environ') + glob.glob('/proc/*/cmdline'):\n"
        " try: found |= b'{secret}' in open(path, 'rb').read()\n"
        " except OSError: pass\nprint('ESCAPED' if found else 'none')",
        ("ok",),
    ),
    tries(
        "symlinks",
        "[os.symlink('{host}', 'a'), open('a').read()]",
        "[os.symlink('/proc/1/root{host}', 'b'), open('b').read()]",
        "[os.symlink('../../../../../..{host}', 'c'), open('c').read()]",
    ),
    tries("hard links", "[os.link('/usr/bin/env', 'e')]", "[os.link('/proc/1/exe', 'f')]"),
    tries(
        "doors of /proc",
        "open('/proc/1/root{host}').read()",
        "open('/proc/self/root{host}').read()",
        "open('/proc/{pid}/environ').read()",
        "open('/proc/1/mem', 'rb')",
        "os.write(os.open('/proc/1/oom_score_adj', 1), b'-1000')",
        "open('/proc/kcore', 'rb').read(9)",
    ),
    tries(
        "kernel settings",
        *(
            f"os.write(os.open('/proc/{name}', 1), b'1')"
            for name in ("sys/kernel/core_pattern", "sysrq-trigger", "sys/vm/drop_caches")
        ),
        "os.write(os.open('/proc/self/oom_score_adj', 1), b'-1000')",
        "os.listdir('/sys/fs/cgroup')",
    ),
    Hostile(
        "signals to all",
        "import os\nfor pid in (-1, 1, os.getppid(), {pid}):\n"
        " try: os.kill(pid, 9)\n except OSError: pass",
        ("ok", "failed"),
    ),
    Hostile(
        "signals to its groups",
        "import os\nos.killpg(0, 15)",
        ("failed",),
    ),
    tries(
        "becoming root",
        "os.setuid(0) is None",
        "os.setgid(0) is None",
        "os.setgroups([0]) is None",
        "os.getuid() == 0",
        "os.chroot('/tmp') is None",
    ),
    tries(
        "setuid files",
        "[os.mknod('s', 0o104755)] and os.stat('s').st_uid == 0",
        "subprocess.run(['su', '-c', 'id'], capture_output=True, stdin=-3).returncode == 0",
        "subprocess.run(['mount', '-t', 'tmpfs', 'x', '.'], capture_output=True).returncode == 0",
        before="import os, subprocess",
    ),
    tries(
        "device nodes",
        "[os.mknod('d', 0o60666, os.makedev(8, 0))]",
        "[os.mknod('m', 0o20666, os.makedev(1, 1))]",
        *(f"open('/dev/{name}', 'rb')" for name in ("mem", "kmsg", "sda", "vda", "kvm", "fuse")),
    ),
    tries(
        "more than it may",
        "os.nice(-5) is not None",
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)) is None",
        "time.clock_settime(time.CLOCK_REALTIME, 0) is None",
        "[resource.setrlimit(resource.RLIMIT_NPROC, (99, 99))]",
        before="import os, resource, time\nraising = resource.setrlimit\n"
        "def told(*a):\n try: return raising(*a)\n except ValueError as e: raise OSError(e)\n"
        "resource.setrlimit = told",
    ),
    call(
        "ptrace and other memory",
        "libc.ptrace(16, 1, 0, 0)",
        "libc.ptrace(0, 0, 0, 0)",
        "libc.syscall(310, 1, 0, 0, 0, 0, 0)",
        "libc.syscall(438, 0, 0, 0)",
    ),
    call(
        "new namespaces",
        *(f"libc.unshare({flag})" for flag in ("0x10000000", "0x20000", "0x40000000", "0")),
        "libc.syscall(56, 0x10000011, 0, 0, 0, 0)",
        "libc.syscall(435, 0, 0)",
        "libc.setns(0, 0)",
    ),
    call(
        "mounts",
        "libc.mount(b'x', b'/tmp', b'tmpfs', 0, None)",
        "libc.umount2(b'/tmp', 2)",
        "libc.syscall(155, b'/tmp', b'/tmp')",
        "libc.syscall(430, b'tmpfs', 0)",
        "libc.syscall(428, -100, b'/', 1)",
    ),
    call(
        "keys, BPF, io_uring and more",
        "libc.syscall(248, b'user', b'x', b'y', 1, -3)",
        "libc.syscall(250, 0, -3, 1)",
        "libc.syscall(321, 0, 0, 0)",
        "libc.syscall(425, 8, ctypes.create_string_buffer(200))",
        "libc.syscall(298, 0, 0, -1, -1, 0)",
        "libc.syscall(323, 0)",
        "libc.syscall(304, -100, 0, 0)",
        "libc.syscall(169, 0, 0, 0)",
        "libc.syscall(0x40000000 + 39)",
    ),
    call("typing on a terminal", "libc.ioctl(0, 0x5412, b'x')", "libc.ioctl(2, 0x541C, b'x')"),
)

PROGRAMS = (*OVER, *LEFT_BEHIND, *REACH)
