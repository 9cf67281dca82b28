"""Processes side by side: order, one after another where asked, what is done is not done again."""

import os

import pytest

from experiments.bench import side_by_side
from experiments.bench.side_by_side import Task, run_tasks

SAYS = "import os, sys, pathlib; pathlib.Path(sys.argv[1]).write_text(str(os.sched_getaffinity(0)))"


def task(folder, name, after="", code=SAYS):
    return Task(name, ("-c", code, str(folder / name)), folder / name, after)


def test_a_task_waits_for_the_one_before_it_has_cores_of_its_own_and_runs_once(tmp_path, capsys):
    cores = len(os.sched_getaffinity(0))
    tasks = [task(tmp_path, "first"), task(tmp_path, "second", after="first")]
    assert run_tasks(tasks, tmp_path / "logs", 1, 1) == []
    told = [line.split()[2] for line in capsys.readouterr().out.splitlines()]
    assert told == ["first:", "second:"]
    assert all(len(eval(one.result.read_text())) == 1 for one in tasks)
    assert run_tasks(tasks, tmp_path / "logs", 1, 1) == [] and not capsys.readouterr().out
    with pytest.raises(ValueError, match=f"on {cores} cores"):
        run_tasks(tasks, tmp_path / "logs", cores + 1, cores + 1)


def test_what_fails_is_told_with_its_log_and_nothing_that_waits_for_it_begins(tmp_path, capsys):
    bad = task(tmp_path, "bad", code="raise OSError('no luck')")
    tasks = [bad, task(tmp_path, "late", after="bad"), task(tmp_path, "good")]
    assert run_tasks(tasks, tmp_path / "logs", 1, 1) == ["bad", "late"]
    assert "OSError: no luck" in capsys.readouterr().out
    assert not tasks[1].result.exists() and tasks[2].result.exists()


def test_tasks_are_asked_to_leave_when_time_is_over_and_killed_where_they_stay(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(side_by_side, "LEAVE_S", 0.5)
    stays = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: None); time.sleep(60)"
    tasks = [task(tmp_path, "stays", code=stays), task(tmp_path, "never")]
    assert run_tasks(tasks, tmp_path / "logs", 1, 1, seconds=1.0) == ["stays", "never"]
    assert "left with -" in capsys.readouterr().out


def test_no_task_begins_without_a_core_where_the_ones_that_run_hold_several(tmp_path, monkeypatch):
    """Three tasks take all nine cores; when the first ends, no more begin than cores came free."""
    held = {}

    class Process:
        """Ends when it was looked at so many times."""

        def __init__(self, one, looks):
            self.one, self.looks, self.returncode = one, looks, 0

        def poll(self):
            self.looks -= 1
            if self.looks > 0:
                return None
            self.one.result.write_text("")
            held.pop(self.one.name, None)
            return 0

    def begin(one, cores, logs):
        assert cores and not set(cores) & {core for used in held.values() for core in used}
        held[one.name] = list(cores)
        return Process(one, 2 + 3 * int(one.name[-1]))

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    monkeypatch.setattr(side_by_side, "_begin", begin)
    monkeypatch.setattr(side_by_side, "LOOK_S", 0.0)
    first = [task(tmp_path, f"cold{i}") for i in range(3)]
    rest = [task(tmp_path, f"arm{i}{j}", after=f"cold{i}") for i in range(3) for j in range(6)]
    assert run_tasks([*first, *rest], tmp_path / "logs", 9, 9) == []
