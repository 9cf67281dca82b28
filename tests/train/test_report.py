"""Laws of the report: its numbers are those of the metrics file, it is the same every time, and its
page says the same and needs no other file.
"""

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glm45_jax.metrics import Jsonl, read_jsonl
from glm45_jax.train.report import write_report

FACTS = {"device": "8 x cpu", "parameters": "1,234 stored | 56 active"}
LOSSES = ("loss", "loss/ce", "loss/mtp", "loss/balance", "val/loss")
BASELINES = {"unigram": 6.125, "bigram": 2.5}


def write_metrics(workdir, *, steps=60, layers=2, experts=4, drop=()):
    """A run whose loss falls and whose experts even out; `drop` names what is not logged."""
    writer, key = Jsonl(workdir / "metrics.jsonl"), np.random.default_rng(0)
    start_LE = key.dirichlet(np.ones(experts), size=layers) if layers else np.zeros((0, experts))
    for step in range(1, steps + 1):
        left = math.exp(-4 * step / steps)
        load_LE = left * start_LE + (1 - left) / experts
        ce = 3 + 4 * left + 0.01 * key.normal()
        scalars = {
            "loss": 1.3 * ce,
            "loss/ce": ce,
            "loss/mtp": ce + 0.5,
            "loss/balance": 1e-4 * ce,
            "lr": 1e-3 * min(1, step / 10),
            "grad_norm": 1 + left,
            "tokens": 4096.0 * step,
            "load_max_over_mean": 1 + left,
            "update_rms/matrix": 2e-4 * left,
            "update_rms/embed": 1e-3 * left,
            "goodput": 0.5 + step / (2 * steps),
            "lost_s/start": 12.5,
            "lost_s/down": 0.5 * step,
        }
        if step > 1:
            scalars |= {"tokens_per_s": 50_000 + 100 * key.normal(), "mfu": 0.123 + 0.001 * step}
        if step in (5, 10) or step % 20 == 0:
            scalars["val/loss"] = ce + 0.1
        arrays = {"load": load_LE.astype(np.float32), "bias": -1e-3 * step * load_LE}
        writer.write(
            step,
            {k: v for k, v in scalars.items() if k not in drop},
            {k: v for k, v in arrays.items() if k not in drop},
        )
    writer.close()
    return read_jsonl(workdir / "metrics.jsonl")


def report(workdir, **changes):
    given = {"title": "quick | start", "facts": FACTS, "baselines": BASELINES, "samples": []}
    return write_report(workdir, **(given | changes))


def cells(text):
    """Value by name of every table row."""
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", text, re.M)
    return dict(rows)


def test_the_numbers_of_the_report_are_those_of_the_metrics_file(tmp_path):
    rows = write_metrics(tmp_path)
    table = cells(report(tmp_path).read_text())

    def logged(name, since=0):
        return [row.scalars[name] for row in rows[since:] if name in row.scalars]

    first, final = np.mean(logged("val/loss")[:2]), logged("val/loss")[-1]
    expected = {
        "validation loss, first 10 steps": f"{first:.4f} nats a token",
        "validation loss, step 60": f"{final:.4f} nats a token",
        "drop of the validation loss": f"{100 * (1 - final / first):.1f} %",
        "unigram model": "6.1250 nats a token; the final loss is below it",
        "bigram model": "2.5000 nats a token; the final loss is NOT below it",
        "training cross-entropy, mean of the last 10 logged steps": (
            f"{np.mean(logged('loss/ce', -10)):.4f}"
        ),
        "training whole loss, mean of the last 10 logged steps": (
            f"{np.mean(logged('loss', -10)):.4f}"
        ),
        "tokens a second, median": f"{np.median(logged('tokens_per_s')):,.0f}",
        "MFU, median": f"{100 * np.median(logged('mfu')):.2f} %",
        "tokens trained on": "245,760",
        "busiest expert over the mean, at the end": f"{rows[-1].scalars['load_max_over_mean']:.2f}",
    }
    assert {name: table[name] for name in expected} == expected
    assert table["parameters"] == r"1,234 stored \| 56 active"


STAGES = [("pretrain", 1), ("midtrain", 41)]
PLOTS = {
    "loss.png": LOSSES,
    "stages.png": (),  # drawn where there are stages, from the losses
    "load.png": ("load",),
    "bias.png": ("bias",),
    "lr.png": ("lr",),
    "update.png": ("update_rms/matrix", "update_rms/embed"),
    "speed.png": ("mfu", "tokens_per_s"),
    "goodput.png": ("goodput",),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """(folder, rows, text) of a report with everything in it, made once."""
    folder = tmp_path_factory.mktemp("run")
    rows = write_metrics(folder)
    return folder, rows, report(folder, stages=STAGES, samples=[("Once", " upon")]).read_text()


def test_every_plot_is_linked_and_is_a_picture_with_something_in_it(told):
    folder, _, text = told
    links = re.findall(r"!\[.+\]\((.+)\)", text)
    assert links == [f"plots/{name}" for name in PLOTS]
    for link in links:
        with Image.open(folder / link) as image:
            assert image.width >= 1200
            assert len(image.convert("RGB").getcolors(1_000_000)) > 50


def test_each_stage_has_its_row_with_the_numbers_of_its_steps(told):
    _, rows, text = told
    for name, steps in (("pretrain", rows[:40]), ("midtrain", rows[40:])):
        losses = [row.scalars["loss/ce"] for row in steps]
        timed = [row.scalars for row in steps if "mfu" in row.scalars]
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert line == (
            f"| {name} | {steps[0].step} to {steps[-1].step} | {np.mean(losses[:10]):.4f} | "
            f"{np.mean(losses[-10:]):.4f} | {np.median([x['tokens_per_s'] for x in timed]):,.0f} | "
            f"{100 * np.median([x['mfu'] for x in timed]):.2f} % |"
        )


class Page(HTMLParser):
    """What a browser takes from a page: tags, cells of tables, pictures, and other text."""

    def __init__(self, body):
        super().__init__(convert_charrefs=True)
        self.tags, self.pictures, self.words, self.open = set(), [], [], []
        self.feed(body)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.pictures.append(dict(attrs))
        assert {name for name, _ in attrs} <= {"charset", "http-equiv", "content", "lang"} | {
            *("alt", "src", "href", "class")
        }
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_says_what_the_report_says_with_every_picture_inside(told):
    folder, _, text = told
    page = Page((folder / "report.html").read_text())
    for name, values in cells(text).items():
        for said in (name, *values.split(" | ")):
            assert not said or said.replace("\\|", "|") in page.words
    assert "Once⟶ upon" in page.words
    found = [p["src"].partition("data:image/png;base64,")[2] for p in page.pictures]
    plots = [(folder / "plots" / name).read_bytes() for name in PLOTS]
    assert [base64.b64decode(one) for one in found] == plots


def test_the_page_loads_and_runs_nothing(told):
    body = (told[0] / "report.html").read_text()
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in body
    bare = re.sub(r"src='data:image/png;base64,[A-Za-z0-9+/=]+'", "", body)
    assert not re.search(r"https?:|url\(|@import|<script|<link|src=|href=|\bon\w+=", bare)


HOSTILE = [
    "</pre></td><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "' onmouseover='alert(1) \" x=",
    "</title><svg/onload=alert(1)> &lt;b&gt; <!--",
    "\0\x1b[31m \u202edaeh \ud800",
]


@pytest.mark.parametrize("said", HOSTILE)
def test_hostile_texts_are_only_shown_on_the_page(tmp_path, said):
    writer = Jsonl(tmp_path / "metrics.jsonl")
    writer.write(1, {"loss/ce": math.nan}, {})
    writer.close()
    report(tmp_path, title=said, facts={said: said}, samples=[(said, said)])
    page = Page((tmp_path / "report.html").read_text())
    assert page.tags <= {*("html head meta title style body h1 h2 table tr th td pre span".split())}
    visible = "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in said)
    assert "".join(page.words).count(visible) == 6  # title, heading, name, value, sample twice


def test_the_same_inputs_give_the_same_bytes_also_over_an_older_report(told, tmp_path):
    def files_of(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    first = files_of(told[0])
    assert len(first) == 3 + len(PLOTS)
    (tmp_path / "metrics.jsonl").write_bytes(first[Path("metrics.jsonl")])
    (tmp_path / "plots").mkdir()
    for name in ("report.md", "report.html", "plots/loss.png"):
        (tmp_path / name).write_text("of a run before")
    report(tmp_path, stages=STAGES, samples=[("Once", " upon")])
    assert files_of(tmp_path) == first


@pytest.mark.parametrize("plot", [plot for plot, names in PLOTS.items() if names])
def test_what_was_not_logged_is_not_plotted_and_an_old_plot_of_it_goes(tmp_path, plot):
    others = [name for other, names in PLOTS.items() if other != plot for name in names]
    write_metrics(tmp_path, steps=12, drop=others)
    (tmp_path / "plots").mkdir()
    for name in PLOTS:
        (tmp_path / "plots" / name).write_text("of a run before")
    text = report(tmp_path).read_text()
    assert re.findall(r"\(plots/(.+)\)", text) == [plot]
    assert [p.name for p in (tmp_path / "plots").iterdir()] == [plot]
    assert (tmp_path / "plots" / plot).read_bytes().startswith(b"\x89PNG")


def test_a_dense_model_and_a_run_of_one_step_have_reports(tmp_path):
    write_metrics(tmp_path, steps=2, layers=0)
    text = report(tmp_path).read_text()
    assert "load.png" not in text and "loss.png" in text
    write_metrics(tmp_path / "one", steps=1)
    assert "load.png" in report(tmp_path / "one").read_text()


def test_without_an_early_validation_the_first_one_is_named(tmp_path):
    writer = Jsonl(tmp_path / "metrics.jsonl")
    for step, loss in ((25, 4.0), (50, 3.0)):
        writer.write(step, {"val/loss": loss}, {})
    writer.close()
    table = cells(report(tmp_path, baselines={}).read_text())
    assert table["validation loss, step 25"] == "4.0000 nats a token"
    assert table["drop of the validation loss"] == "25.0 %"


def test_numbers_that_are_not_finite_are_shown_as_such_and_break_nothing(tmp_path):
    write_metrics(tmp_path, steps=20)
    writer = Jsonl(tmp_path / "metrics.jsonl")
    nan_LE = np.full((2, 4), np.nan, np.float32)
    bad = {"loss": math.inf, "loss/ce": math.nan, "val/loss": math.nan, "tokens_per_s": math.nan}
    writer.write(21, bad, {"load": nan_LE, "bias": nan_LE})
    writer.close()
    table = cells(report(tmp_path).read_text())
    assert table["validation loss, step 21"] == "nan nats a token"
    assert "NOT below" in table["unigram model"]
    assert "nan" not in table["tokens a second, median"]


@pytest.mark.parametrize("ticks", ["", "`", "```", "``````"])
def test_a_sample_cannot_leave_its_block(tmp_path, ticks):
    write_metrics(tmp_path, steps=3, drop=("load", "bias", "lr", *LOSSES))
    hostile = f"{ticks}\n# not a heading\n{ticks}text \ud800 |"
    text = report(tmp_path, samples=[("Once", hostile), ("Two", " b")]).read_text()
    block = text[text.index("## Samples") :]
    fence = re.search(r"^(`{3,})text$", block, re.M).group(1)
    assert len(fence) > len(ticks)
    inner = block.split(fence + "text\n", 1)[1].split(f"\n{fence}\n", 1)[0]
    assert inner == f"Once⟶{hostile}".replace("\ud800", "\\ud800")
    assert "```text\nTwo⟶ b\n```" in block


def test_without_metrics_there_is_no_report(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is empty; log at least one step"):
        report(tmp_path)


def test_plotting_leaves_the_settings_of_the_caller_alone(tmp_path):
    import matplotlib as mpl

    write_metrics(tmp_path, steps=3, drop=("load", "bias"))
    before = dict(mpl.rcParams)
    report(tmp_path)
    assert dict(mpl.rcParams) == before
