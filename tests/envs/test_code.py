"""Programs judged by tests that they can neither read nor reach."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from glm45_jax.envs import bwrap, code, sandbox
from glm45_jax.envs.sandbox import Limits, SandboxError
from tests.envs.boxes import needs_box
from tests.envs.common import prove, reply, score

LIMITS = Limits(wall_s=30.0, cpu_s=2.0, memory=128 * 2**20)
GOLD = """
def double(x): return x * 2
def grow(x): x.append(2)
class Stack:
    def __init__(self, items=()): self.items = list(items)
    def push(self, item): self.items.append(item); return self
    def top(self): return self.items[-1]
    def __len__(self): return len(self.items)
    def __eq__(self, other): return self.items == other.items
def count(n): yield from range(n)
"""
NAMES = ["double", "grow", "Stack", "count"]
ASSERTS = [
    "assert double(2) == 4",
    "assert double('ab') == 'abab' and double([1]) == [1, 1] and double((1,)) == (1, 1)",
    "x = [1]; assert grow(x) is None; assert x == [1, 2]",
    "s = Stack(); s.push(1).push((2, 3)); assert s.top() == (2, 3) and len(s) == 2",
    "assert Stack([1]) == Stack([1]) and Stack([1]) != Stack([2]) and Stack([5]).items == [5]",
    "assert list(count(3)) == [0, 1, 2] and next(count(1)) == 0",
    "try:\n    double(None)\nexcept TypeError:\n    pass\nelse:\n    assert False",
    "assert double(1.5) == 3.0 and double(2j) == 4j and double(b'x') == b'xx'",
    "assert double(True) == 2 and double(True) is not True and double({}.get('x', 0)) == 0",
    "assert double(2**70) == 2**71",
]
ROWS = (
    {"question": "Doubles and more.", "asserts": ASSERTS, "entry": NAMES},
    {
        "question": "Add two numbers.",
        "tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "30 4", "output": "34"}],
    },
)
SUM = "print(sum(map(int, input().split())))"


def fenced(program: str) -> str:
    return f"Here it is.\n```python\n{program}\n```\nDone."


# Programs that want the reward without the work.
CHEATS = {
    "exit": "import sys\nsys.exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "exit in a call": "import os\ndef double(x): os._exit(0)\ngrow = Stack = count = double",
    "PASSED": "print('PASSED\\n3\\nok 1\\nTrue' * 9)",
    "always equal": "class Yes:\n    def __eq__(self, other): return True\n"
    "    def __ne__(self, other): return False\n    def __bool__(self): return True\n"
    "    def __getattr__(self, name): return self\n    def __call__(self, *a, **k): return self\n"
    "    def __len__(self): return 2\n"
    "def double(*a): return Yes()\ngrow = Stack = count = double",
    "patched checker": "import builtins, json, socket, sys\n"
    "builtins.AssertionError = type('E', (Exception,), {})\n"
    "json.loads = lambda s: {'value': {'v': 4}}\n"
    "sys.modules['calls'] = None\nsys.settrace(lambda *a: None)\nexec = compile = print",
    "patched frames": "import sys\nf = sys._getframe()\nwhile f:\n"
    "    f.f_globals['passed'] = True\n"
    "    f.f_globals['check'] = f.f_globals['Caller'] = lambda *a: True\n    f = f.f_back",
    "replies before it is asked": "import os, struct, json\nfor fd in range(3, 20):\n"
    "    for i in range(200):\n        m = json.dumps({'id': i, 'value': {'v': True}}).encode()\n"
    "        try: os.write(fd, struct.pack('>I', len(m)) + m)\n        except OSError: break\n"
    "def double(x): return True\ngrow = Stack = count = double",
    "counts on the socket": "import os\nfor fd in range(1, 20):\n"
    "    try: os.write(fd, b'passed 0\\npassed 1\\ncompiles\\n' * 9)\n    except OSError: pass",
    "reads the tests": "import glob\nfor path in glob.glob('/tmp/*') + glob.glob('/proc/*/environ')"
    " + ['/.files.tar']:\n    try: print(open(path).read())\n    except Exception: pass",
    "fork and exit": "import os\nif os.fork(): os._exit(0)",
    "huge output": "while True: print('3' * 9999)",
    "huge value": "def double(x): return 'x' * 10**8\ngrow = Stack = count = double",
    "deep value": "def double(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y\n"
    "grow = Stack = count = double",
    "raises what is caught": "def double(x): raise TypeError\ngrow = Stack = count = double",
    "raises to stop the checker": "def double(x): raise SystemExit\ngrow = Stack = count = double",
    "kills": "import os\nos.kill(-1, 9)",
    "memory": "x = [bytearray(2**20) for _ in range(10**4)]",
    "not Python": "def double(x: return 2 * x",
    "NUL": "double = 1\0",
}


@needs_box
def test_code_by_asserts_proves_itself():
    env = code.env(ROWS[:1], limits=LIMITS)
    task = env.tasks(0)
    wrongs = {name: fenced(cheat) for name, cheat in CHEATS.items()}
    wrongs |= {
        "empty": "",
        "no code": "It doubles.",
        "empty block": fenced(""),
        "not closed": f"```python\n{GOLD}",
        "the gold not last": fenced(GOLD) + "\n" + fenced("x = 1"),
        "not fenced": GOLD,
        "one wrong": fenced(GOLD.replace("append(2)", "append(3)")),
        "too long": fenced(GOLD + "#" * code.MAX_CODE),
    }
    # The parts agree with the truth, and eight at once are as right as one.
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: score(env, task, text), wrongs.values()))
    prove(env, task, fenced(GOLD), wrongs)


@needs_box
def test_code_by_output_proves_itself():
    env = code.env(ROWS[1:], limits=LIMITS)
    task = env.tasks(0)
    wrongs = {name: fenced(cheat) for name, cheat in CHEATS.items()}
    wrongs["both answers"] = fenced("print(3)\nprint(34)")
    wrongs["the prompt's reading"] = fenced("print(input())")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: score(env, task, text), wrongs.values()))
    prove(env, task, fenced(SUM), wrongs)


@needs_box
def test_parts_say_how_much_was_right():
    env = code.env(ROWS, limits=LIMITS, share_weight=0.5)
    tasks = {task.meta["row"]: task for task in map(env.tasks, range(2))}
    half = env.judge(tasks[1], reply(tasks[1], fenced("print(3)")))
    assert half.parts == {"all": 0, "passed": 0.5, "compiles": 1} and half.reward == 0.25
    broken = env.judge(tasks[1], reply(tasks[1], fenced("print(")))
    assert broken.parts == {"all": 0, "passed": 0, "compiles": 0}
    part = GOLD.replace("x * 2", "4 if x == 2 else 0")
    some = env.judge(tasks[0], reply(tasks[0], fenced(part)))
    assert some.parts["passed"] == pytest.approx(5 / len(ASSERTS)) and some.parts["all"] == 0


@needs_box
def test_a_test_that_never_ends_fails_alone():
    program = GOLD.replace("return x * 2", "\n    while x == 2: pass\n    return x * 2")
    found = code.by_asserts(program, ASSERTS, NAMES, LIMITS, sandbox.Bwrap())
    assert found == code.Outcome(len(ASSERTS) - 1, len(ASSERTS), True)


@needs_box
def test_what_one_test_leaves_behind_the_next_does_not_see():
    program = "seen = []\ndef double(x): seen.append(x); return len(seen)"
    asserts = ["assert double(1) == 1"] * 3
    assert code.by_asserts(program, asserts, ["double"], LIMITS, sandbox.Bwrap()).passed == 3


@needs_box
def test_parts_and_equal_answers_share_one_run(monkeypatch):
    env = code.env(ROWS[1:], limits=LIMITS)
    task, calls = env.tasks(0), []
    run = sandbox.run
    monkeypatch.setattr(sandbox, "run", lambda *a, **k: calls.append(a) or run(*a, **k))
    program = fenced(f"{SUM}  # {time.time()}")
    assert env.judge(task, reply(task, program)).reward == 1
    assert env.judge(task, reply(task, program)).reward == 1
    assert len(calls) == 1 + len(ROWS[1]["tests"])


def test_without_a_box_nothing_is_judged(monkeypatch, tmp_path):
    monkeypatch.delenv("GLM45_BWRAP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(bwrap, "FETCHED", tmp_path / "bwrap")
    for row in ROWS:
        env = code.env([row])
        task = env.tasks(0)
        with pytest.raises(SandboxError, match="bubblewrap is not at"):
            env.judge(task, reply(task, fenced(f"print('{tmp_path}')")))
        assert env.judge(task, reply(task, "no code")).reward == 0


def test_the_last_closed_block_is_the_code():
    assert code.block("a\n```python\nx = 1\n```\nb\n```\ny = 2\n```") == "y = 2"
    for text in ("x = 1", "```python\nx = 1", "```\n\n```", "```\nx\n```\n```\nopen", ""):
        assert code.block(text) is None


def test_rows_say_how_they_are_judged():
    for row in ({}, {"tests": []}, {"asserts": ["x"]}, {**ROWS[0], "tests": ROWS[1]["tests"]}):
        with pytest.raises(ValueError, match="give tests, or asserts and entry"):
            code.env([{"question": "?", **row}])


def test_the_policy_is_not_shown_the_tests():
    env = code.env(ROWS)
    for number in range(2):
        prompt = str(env.tasks(number).prompt)
        assert "assert" not in prompt and "34" not in prompt
