"""Laws of the RL report: its numbers are those of the metrics file, it is the same every time."""

import pytest
from PIL import Image

from glm45_jax.metrics import Jsonl, read_jsonl
from glm45_jax.rl.report import PHASES, WARM, results, write_report
from glm45_jax.train.curves import Curves

BATCHES, LOUD = 12, (3, 4, 5, 9)


def write_metrics(workdir, *, drop=()):
    """A run whose reward rises, scored before it and every four batches."""
    writer = Jsonl(workdir / "metrics.jsonl")
    for step in range(BATCHES + 1):
        scalars = {}
        if step % 4 == 0:
            scalars |= {"eval/sampled": 0.25 + step / 24, "eval/sampled_half": 0.03125}
            scalars |= {"eval/greedy": 0.5, "eval/greedy_half": 0.0625, "seconds/evaluate": 0.25}
        if step:
            scalars |= {"reward": step / 16, "samples": 32.0, "tokens/trained": 100.0}
            scalars |= {
                "surprise": 1 / step,
                "policy/entropy": 1 / step,
                "mismatch/kl": 1e-7 * step,
            }
            scalars |= {"length/mean": 10.0, "length/p95": 20.0, "length/cut": 0.0}
            scalars |= {"watch/alarms": float(step in LOUD), "tokens_per_s": 50.0}
            scalars |= {"seconds": 4.0 if step > WARM else 400.0, "seconds/rollout": 1.0}
            scalars |= {"seconds/train": 2.0, "seconds/other": 0.0}
        writer.write(step, {k: v for k, v in scalars.items() if not k.startswith(drop)}, {})
    writer.close()


def report(workdir, **given):
    return write_report(workdir, title="a run", facts={"ended": "done"}, **given)


def row(text, name):
    """The second cell of the row that begins with this name."""
    return next(line.split("|")[2].strip() for line in text.splitlines() if f"| {name}" in line)


def test_the_scores_are_those_before_and_after_with_their_intervals(tmp_path):
    write_metrics(tmp_path)
    text = report(tmp_path).read_text()
    told = "held-out reward, sampled at the temperature of training, after batch"
    assert row(text, f"{told} 0") == "0.2500 ± 0.0312 (95%)"
    assert row(text, f"{told} 12") == "0.7500 ± 0.0312 (95%)"
    assert row(text, "reward, mean of the first 5") == "0.1875"
    assert row(text, "reward, mean of the last 5") == "0.6250"
    assert row(text, "samples that ended") == str(32 * BATCHES)
    assert row(text, "KL of engine to trainer") == "1.20e-06 nats a token"


def test_times_leave_out_the_batches_that_compile(tmp_path):
    write_metrics(tmp_path)
    text = report(tmp_path).read_text()
    assert row(text, "whole") == "4.00"
    assert row(text, "rollout") == "1.00 (25 % of all the time)"
    assert row(text, "train") == "2.00 (50 % of all the time)"


def test_alarms_are_told_by_batch_and_at_the_end(tmp_path):
    write_metrics(tmp_path)
    text = report(tmp_path, alarms=["cut: was 0.1 | is 0.9"]).read_text()
    assert "Rules spoke after 4 of 12 batches: 3-5, 9." in text
    assert "- cut: was 0.1 \\| is 0.9" in text


def test_the_same_metrics_give_the_same_bytes_and_every_plot_is_there(tmp_path):
    write_metrics(tmp_path)

    def everything():
        report(tmp_path, samples=["1+1=⟶```2"])
        return {p.name: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}

    first = everything()
    assert first == everything()
    assert {"reward.png", "policy.png", "length.png", "time.png"} <= first.keys()
    assert "````text\n1+1=⟶```2\n````" in first["report.md"].decode()
    for name in first:
        if name.endswith(".png"):
            with Image.open(tmp_path / "plots" / name) as image:
                assert image.size[0] > 500


def test_the_page_says_the_same_and_shows_what_is_hostile(tmp_path):
    write_metrics(tmp_path)
    bad = "</pre><script>alert(1)</script>"
    report(tmp_path, alarms=[bad], samples=[bad], links=[(bad, "trace.html")])
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") == 3
    assert "<a href='trace.html'>" in page and "Rules spoke after 4 of 12 batches: 3-5, 9." in page
    assert page.count("src='data:image/png;base64,") == page.count("src=") == 4


@pytest.mark.parametrize("drop", ["eval", "reward", "length", "seconds"])
def test_what_was_not_logged_is_left_out(tmp_path, drop):
    write_metrics(tmp_path, drop=drop)
    text = report(tmp_path).read_text()
    assert "nan" not in text and "# a run" in text
    assert ("held-out reward" in text) == (drop != "eval")
    assert (tmp_path / "plots/time.png").exists() == (drop != "seconds")


def test_a_run_without_metrics_has_no_report(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="is empty"):
        report(tmp_path)


def test_a_run_that_ended_before_its_first_batch_is_told_too(tmp_path):
    writer = Jsonl(tmp_path / "metrics.jsonl")
    writer.write(0, {"eval/sampled": 0.5, "eval/sampled_half": 0.1, "seconds": 3.0}, {})
    writer.close()
    found = results(Curves(read_jsonl(tmp_path / "metrics.jsonl")))
    assert [value for _, value in found] == ["0.5000 ± 0.1000 (95%)"]
    assert "whole" not in report(tmp_path).read_text()
    assert len(set(PHASES)) == len(PHASES)
