"""What gets out of a box, and what is left of it: nothing."""

import gc
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from glm45_jax.envs import bwrap, cgroup, sandbox, seccomp, watch
from glm45_jax.envs.docker import Docker
from glm45_jax.envs.sandbox import Limits, Result, SandboxError
from tests.envs.boxes import needs_box
from tests.envs.hostile import FORKS, LIMITS, PROGRAMS, THREADS

AT_ONCE = 8
LATE_S = 6.0  # what a busy machine may add to a limit of time
PYTHON = ("python3", "-I")


def processes_of(mark: str) -> list[str]:
    """Processes that have this word on their command line, as those of a box started with it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "cmdline").read_bytes():
                found.append(folder.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def host_state(mark: str) -> dict[str, object]:
    """What a program might change of the host."""
    gc.collect()
    groups = [
        path
        for folder in set(cgroup.parents().folders.values())
        for path in folder.glob(f"{cgroup.NAME}-{os.getpid()}-*")
    ]
    return {
        "processes": processes_of(mark),
        "groups": groups,
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "host": socket.gethostname(),
        "shared": Path("/dev/shm/x").exists(),
        "core": Path("/proc/sys/kernel/core_pattern").read_text(),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Results of all hostile programs, eight at once, with traps on the host for them."""
    if (why := sandbox.missing()) is not None:
        pytest.skip(why)
    secret, mark = f"canary{secrets.token_hex(8)}", f"mark{secrets.token_hex(8)}"
    host = tmp_path_factory.mktemp("host") / "secret.txt"
    host.write_text(secret)
    reached = []
    os.environ["GLM45_CANARY"] = secret
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX) as named,
    ):
        abstract.bind(f"\0{secret}")
        named.bind(f"{host}.socket")
        for trap in (tcp, abstract, named):
            trap.listen()
        facts = {"host": host, "port": tcp.getsockname()[1], "pid": os.getpid(), "secret": secret}
        facts |= {"forks": FORKS, "threads": THREADS}
        before = host_state(mark)

        def one(program) -> Result:
            code = program.code.format(**facts)
            files = {"main.py": code}
            command = [*PYTHON, "main.py", mark]
            return sandbox.run(files, command, stdin=program.stdin, limits=program.limits)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            results = dict(zip([p.name for p in PROGRAMS], pool.map(one, PROGRAMS), strict=True))
        after = host_state(mark)
        for trap in (tcp, abstract, named):
            trap.settimeout(0)
            try:
                reached.append(trap.accept())
            except BlockingIOError:
                continue
    del os.environ["GLM45_CANARY"]
    return results, before, after, reached, host.read_text() == secret, secret.encode()


def test_there_are_more_than_thirty_hostile_programs_of_different_names():
    assert len({program.name for program in PROGRAMS}) == len(PROGRAMS) > 30


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_a_hostile_program_is_contained_within_its_limits(ended, program):
    result = ended[0][program.name]
    assert b"ESCAPED" not in result.stdout, result.stdout
    assert ended[5] not in result.stdout, "it read the host's secret"
    assert result.status in program.ends, result
    assert result.seconds < program.limits.wall_s + LATE_S
    assert len(result.stdout) <= LIMITS.output and len(result.stderr) <= LIMITS.output
    if cgroup.parents().folders:
        assert result.max_rss <= LIMITS.memory


def test_the_host_is_as_before_after_eight_hostile_programs_at_once(ended):
    _, before, after, reached, unchanged, _ = ended
    assert after == before
    assert not reached and unchanged


@needs_box
def test_a_program_gets_its_files_its_stdin_and_nothing_else():
    files = {"a/b.txt": "text", "c.bin": b"\0\xff"}
    code = (
        "import os, sys\n"
        "print(open('a/b.txt').read(), open('c.bin', 'rb').read(), sys.stdin.read())\n"
        "open('a/new', 'w').write('x'); print(sorted(os.listdir('.')), sorted(os.environ))"
    )
    result = sandbox.run({**files, "m.py": code}, [*PYTHON, "m.py"], stdin="ü".encode())
    assert result.ok, result
    first, second = result.stdout.decode().splitlines()
    assert first == "text b'\\x00\\xff' ü"
    names, _, variables = second.partition("] [")
    assert names == "['a', 'c.bin', 'm.py'"
    kept = {"HOME", "LANG", "PATH", "PWD", "TMPDIR", "USER"}
    assert (
        not {v for v in eval("[" + variables) if "THREADS" not in v} - kept - {"OLDPWD", "LC_CTYPE"}
    )


@needs_box
def test_exit_codes_and_signals_come_back_as_a_shell_tells_them():
    for command, code in ((["sh", "-c", "exit 7"], 7), (["sh", "-c", "kill -9 $$"], 137)):
        result = sandbox.run({}, command)
        assert (result.status, result.code) == ("failed", code)
    assert sandbox.run({}, ["no-such-program"]).code == 127
    assert sandbox.run({}, ["true"]).status == "ok"


@needs_box
def test_what_was_written_before_a_limit_struck_is_kept():
    code = "print('begun', flush=True)\nimport time\ntime.sleep(60)"
    result = sandbox.run({}, [*PYTHON, "-c", code], limits=Limits(wall_s=2.0))
    assert (result.status, result.stdout) == ("time", b"begun\n")


@needs_box
def test_a_program_can_be_ended_and_talked_to_from_outside():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        code = "import socket, sys, time\nsocket.socket(fileno=int(sys.argv[1])).send(b'hello')\n"
        code += "time.sleep(60)"
        command = [*PYTHON, "-c", code, str(theirs.fileno())]
        running = sandbox.start({}, command, fds=[theirs.fileno()])
        results = []
        waiter = threading.Thread(target=lambda: results.append(running.wait()))
        waiter.start()
        ours.settimeout(10)
        assert ours.recv(9) == b"hello"
        running.kill()
        waiter.join(10)
    assert [result.status for result in results] == ["killed"]


@needs_box
def test_a_box_does_not_outlive_the_process_that_runs_it(monkeypatch):
    mark = f"mark{secrets.token_hex(8)}"
    code = "import sys; from glm45_jax.envs import sandbox\n"
    code += "sandbox.run({}, ['sh', '-c', 'sleep 60 & sleep 60', sys.argv[1]])"
    command = [sys.executable, "-c", code, mark]
    root = Path(__file__).parents[2]
    # Its own number is in the list while it lives: three are it, bwrap and the box's first process.
    with subprocess.Popen(command, cwd=root) as process:
        until(lambda: len(processes_of(mark)) > 2)
        process.kill()
    until(lambda: not processes_of(mark))
    monkeypatch.setattr(cgroup, "STALE_S", -1.0)
    name = f"{cgroup.NAME}-{process.pid}-*"

    def swept() -> bool:
        """What a later process does with the empty groups of a dead one."""
        cgroup.sweep()
        return not [path for f in cgroup.parents().folders.values() for path in f.glob(name)]

    until(swept)


def until(true) -> None:
    """Waits for it; fails after half a minute."""
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@needs_box
def test_two_boxes_do_not_see_each_other():
    look = "import glob, time\ntime.sleep(.3)\n"
    look += "print(len(glob.glob('/proc/[0-9]*')), glob.glob('/tmp/*'))"
    with ThreadPoolExecutor(2) as pool:
        results = list(
            pool.map(lambda i: sandbox.run({f"f{i}.py": look}, [*PYTHON, f"f{i}.py"]), range(2))
        )
    assert [r.stdout for r in results] == [f"2 ['/tmp/f{i}.py']\n".encode() for i in range(2)]


root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root has several ways to make a box")
SOME = {
    *("many processes", "memory bomb", "memory bomb of many", "disk fill", "file flood", "daemon"),
    *("internet", "write outside", "new namespaces", "mounts", "becoming root", "infinite output"),
    *("deaf and busy in native code", "shared memory bomb", "ptrace and other memory"),
}


def contained(programs, ways: tuple[str, ...]) -> None:
    """All of these are; `ways` are statuses besides their own that they may end with."""
    facts = {"host": "/etc/hostname", "port": 9, "pid": os.getpid(), "secret": "none"}
    facts |= {"forks": FORKS, "threads": THREADS}

    def one(program) -> Result:
        files = {"main.py": program.code.format(**facts)}
        return sandbox.run(files, [*PYTHON, "main.py"], limits=program.limits)

    with ThreadPoolExecutor(4) as pool:
        for program, result in zip(programs, pool.map(one, programs), strict=True):
            assert b"ESCAPED" not in result.stdout, (program.name, result)
            assert result.status in (*program.ends, *ways), (program.name, result)


@needs_box
@root_only
def test_rlimits_and_the_watch_confine_where_no_group_can_be_made(monkeypatch):
    monkeypatch.setattr(cgroup, "make", lambda limits, own: None)
    programs = [program for program in PROGRAMS if program.name in SOME]
    assert len(programs) == len(SOME)
    contained(programs, ("processes",))


@needs_box
@root_only
def test_the_way_of_ordinary_users_confines_as_well(monkeypatch):
    monkeypatch.setattr(bwrap, "mode_of", lambda path: "user")
    if "pids" not in cgroup.parents().folders:
        pytest.skip("no pids cgroup can be made here, and without one root may not go this way")
    contained([program for program in PROGRAMS if program.name in SOME], ())


@root_only
def test_root_gets_no_box_in_which_a_fork_bomb_has_no_limit(monkeypatch):
    monkeypatch.setattr(cgroup, "make", lambda limits, own: None)
    with pytest.raises(SandboxError, match="need a pids cgroup"):
        bwrap._launch(bwrap.Bwrap(), "/bin/true", "user", {}, ["true"], Limits(), ())


def test_counting_a_bomb_stops_soon():
    """The watch looks at no more processes than the limit, however many there are."""
    pids, _, _, threads = watch._tree(1, 3)
    assert 1 <= len(pids) <= 4 and threads >= 1


def test_without_bwrap_nothing_runs_and_one_message_says_the_way_out(monkeypatch, tmp_path):
    monkeypatch.delenv("GLM45_BWRAP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(bwrap, "FETCHED", tmp_path / "bwrap")
    with pytest.raises(SandboxError, match=r"bubblewrap is not at.*launch/sandbox\.sh"):
        sandbox.run({}, ["touch", str(tmp_path / "ran")])
    assert sandbox.missing() is not None and not (tmp_path / "ran").exists()


def test_a_bwrap_that_cannot_make_a_box_says_so(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho no namespaces here >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("GLM45_BWRAP", str(broken))
    with pytest.raises(SandboxError, match=r"cannot make a box.*no namespaces here"):
        sandbox.run({}, ["true"])


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "", ".", "a\0b"])
def test_names_of_files_stay_in_the_folder(name):
    with pytest.raises(ValueError, match="stay in the folder"):
        sandbox.run({name: "x"}, ["true"], box=sandbox.Bwrap("/bin/true"))


def test_wrong_calls_are_refused_before_anything_runs():
    box = sandbox.Bwrap("/bin/true")
    limits = Limits(disk=10)
    with pytest.raises(ValueError, match="11 bytes, limits are 4096 and 10"):
        bwrap._launch(box, "x", "user", {"a": "x" * 11}, ["true"], limits, ())
    for command in ([], "true", ["a\0"], ["x" * 200_000]):
        with pytest.raises(ValueError, match="command is"):
            bwrap._launch(box, "x", "user", {}, command, Limits(), ())
    with pytest.raises(ValueError, match="limit memory is 0"):
        Limits(memory=0)


def test_the_filter_of_system_calls_is_well_formed_and_refuses_other_machines():
    for machine in seccomp.ARCHITECTURES:
        code = seccomp.program(machine)
        lines = [code[i : i + 8] for i in range(0, len(code), 8)]
        assert len(code) % 8 == 0 and len(lines) < 4096
        for at, line in enumerate(lines):  # every jump lands inside
            if line[0] & 7 == 5:
                assert at + 1 + max(line[2], line[3]) < len(lines)
    with pytest.raises(ValueError, match="no system call numbers for s390x"):
        seccomp.program("s390x")


def test_groups_of_version_2_are_set_by_name(tmp_path):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    (root / "job").mkdir(parents=True)
    own.write_text("0::/job\n")
    (root / "cgroup.controllers").write_text("cpu memory pids")
    (root / "job" / "cgroup.subtree_control").write_text("cpu memory pids")
    cgroup.parents.cache_clear()
    found = cgroup.parents(root, own)
    cgroup.parents.cache_clear()
    assert found.version == 2 and not found.folders  # a made group has no cgroup.procs: no kernel
    folder = root / "job" / "one"
    folder.mkdir()
    for name in ("memory.max", "memory.swap.max", "pids.max", "cpu.max"):
        (folder / name).touch()
    (folder / "memory.events").write_text("low 0\noom 1\noom_kill 2\n")
    (folder / "memory.peak").write_text("123\n")
    (folder / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    group = cgroup.Cgroup(2, dict.fromkeys(("memory", "pids", "cpu"), folder))
    cgroup._set(group, Limits(memory=77, processes=5, cpus=0.5), 3)
    assert (folder / "memory.max").read_text() == "77"
    assert (folder / "pids.max").read_text() == "8"
    assert (folder / "cpu.max").read_text() == "50000 100000"
    assert (group.cpu(), group.peak(), group.hit()) == (2.5, 123, "memory")


def test_dockers_argument_list_has_every_limit():
    limits = Limits(memory=7, processes=3, disk=5, files=6, cpu_s=1.5, cpus=0.5, open_files=9)
    words = Docker("python:3.12").arguments("name", "/x.tar", limits)
    text = " ".join(words)
    for expected in (
        *("--network none", "--memory 7 --memory-swap 7", "--pids-limit 4", "--cpus 0.5"),
        *("--read-only", "--tmpfs /tmp:rw,exec,nosuid,nodev,mode=1777,size=5,nr_inodes=6"),
        *("--cap-drop ALL", "--security-opt no-new-privileges", "--user 61234:61234"),
        *("--ulimit cpu=2:3", "--ulimit fsize=5", "--ulimit nofile=9", "--pull never"),
        "--mount type=bind,source=/x.tar,target=/.files.tar,readonly",
    ):
        assert expected in text
    assert words[:3] == ["docker", "run", "--interactive"]


def test_docker_without_a_client_or_for_descriptors_is_refused(tmp_path):
    with pytest.raises(SandboxError, match="not on PATH"):
        sandbox.run({}, ["true"], box=Docker("x", path=str(tmp_path / "docker")))
    with pytest.raises(ValueError, match="inherits none"):
        sandbox.start({}, ["true"], box=Docker("x"), fds=[1])


@needs_box
def test_a_box_starts_in_a_fraction_of_a_second():
    def once() -> float:
        began = time.monotonic()
        assert sandbox.run({}, ["true"]).ok
        return time.monotonic() - began

    assert min(once() for _ in range(5)) < 0.5


@needs_box
def test_a_program_never_runs_for_a_process_that_is_already_dead():
    """As when it is killed while bwrap is still at work: nobody gives the program its line."""
    launch = bwrap.Bwrap().launch({}, [*PYTHON, "-c", "print('ran')"], Limits())
    try:
        done = subprocess.run(
            launch.argv,
            env=launch.env,
            pass_fds=launch.fds,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
            check=False,
        )
    finally:
        for fd in (*launch.opened, launch.status_fd):
            os.close(fd)
        launch.close()
    assert (done.returncode, done.stdout) == (125, b"\n")
