"""Laws of the viewer: every text comes through as text, whatever it says; numbers are those of the
pool; what is not shown is said."""

import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45_jax.rl.ledger import Ledger
from glm45_jax.rl.pool import Pool, Prompt, Rules
from glm45_jax.rl.trajectory import Trajectory
from glm45_jax.rl.viewer import Shown, main, page, write_page
from glm45_jax.train.document import attribute, text

ROOT = Path(__file__).resolve().parents[2]
TAGS = set(
    "html head meta title style body h1 h2 p b table tr th td details summary div span pre".split()
)
ATTRIBUTES = {"charset", "http-equiv", "content", "class", "title", "lang"}
HOSTILE = [
    "</pre><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "' onmouseover='alert(1)",
    '" onfocus="alert(1)',
    "</style><svg/onload=alert(1)>",
    "<!--",
    "]]>",
    "&lt;script&gt;&#60;",
    "\0\x1b[31m\u202edaeh\ufeff",
    "\ud800 lone",
    "javascript:alert(1)",
    "漢字 ünï 🎉",
]


class Reader(HTMLParser):
    """The tags, their attributes and the text of a page, as a browser would see them."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.titles, self.words, self.depth = set(), set(), [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.titles += [value for name, value in attrs if name == "title"]
        if tag != "meta":
            self.depth.append(tag)

    def handle_endtag(self, tag):
        assert self.depth.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")


def read(body):
    reader = Reader()
    reader.feed(body)
    reader.close()
    assert not reader.depth and reader.tags <= TAGS and reader.attributes <= ATTRIBUTES
    return reader


def visible(said):
    """What the page shows of a text."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"U+{ord(c):04X}" for c in said)


def sample(key, j, said="answer", *, version=3, n=6):
    return Trajectory(
        task_id=key,
        group=key,
        tokens_T=np.arange(10, 10 + n, dtype=np.int32),
        sampled_T=np.arange(n) > 1,
        logp_T=np.linspace(-9, -0.125, n).astype(np.float32),
        versions_T=np.where(np.arange(n) < n - 1, version, version + 1).astype(np.int32),
        reward=float(j),
        messages=(
            {"role": "user", "content": said},
            {"role": said, "content": said, "tool_calls": [{"name": said, "arguments": {"a": 1}}]},
        ),
        parts={"right": float(j), said: 0.25},
    )


def pool_at(folder, *, run="a run", said="answer", groups=2, batches=3, trained=2):
    n = groups * batches
    with Pool(folder, run=run, rules=Rules(groups=groups, staleness=batches), filters=()) as pool:
        pool.add([Prompt(said, i, 2, f"{said}/{i}", {"level": said}) for i in range(n)])
        for lease in pool.lease(n, version=0):
            key = lease.prompt.key
            pool.commit(lease, [sample(key, j, said) for j in lease.samples])
        for batch in range(batches):
            pool.take(batch)
            if batch < trained:
                advantages = [-0.5, 0.5] + [None] * (2 * groups - 2)
                pool.trained(batch, advantages=advantages, numbers={"loss": 0.125, said: 1.0})
    return folder


def page_of(folder, **options):
    ledger = Ledger(folder, run=None, read_only=True)
    body = "".join(page(ledger, **options))
    ledger.close()
    return body


@pytest.mark.parametrize("said", HOSTILE)
def test_hostile_texts_are_only_shown(tmp_path, said):
    storable = said.replace("\ud800", "\ufffd")  # SQLite's text is UTF-8; JSON has all of it
    with Pool(tmp_path, run=storable, rules=Rules(groups=1), filters=()) as pool:
        pool.add([Prompt(storable, 0, 2, storable, {said: said})])
        (lease,) = pool.lease(1, version=0)
        pool.commit(lease, [sample(storable, j, said) for j in lease.samples])
        pool.take(0)
        pool.trained(0, numbers={said: 1.0})
    body = page_of(tmp_path, decode=lambda token: said)
    body.encode()  # no half of a surrogate pair
    words = "".join(read(body).words)
    assert words.count(visible(said)) >= 20  # every token, message, part and name
    for shown in (title for title in read(body).titles if "\n" not in title):
        assert re.fullmatch(
            r"\d+: id \d+, (given|log-prob -?[\d.]+ \(p [\d.]+\), version \d+)", shown
        )


@given(said=st.text(st.characters(), max_size=40))
def test_any_text_reads_back_as_what_is_visible_of_it(said):
    reader = read(f"<p title='{attribute(said)}'>{text(said)}</p>")
    assert "".join(reader.words) == visible(said)
    assert reader.titles == [visible(said).replace("\n", "U+000A").replace("\t", "U+0009")]
    assert reader.tags <= {"p", "span"}


def test_tokens_say_log_prob_and_version_and_what_was_given(tmp_path):
    body = page_of(pool_at(tmp_path, batches=1))
    titles = read(body).titles
    one = sample("k", 0)
    assert len(titles) == 4 * len(one.tokens_T)
    for t in range(len(one.tokens_T)):
        if one.sampled_T[t]:
            told = f"{t}: id {one.tokens_T[t]}, log-prob {one.logp_T[t]:.4f} (p "
            assert titles[t].startswith(told)
            assert titles[t].endswith(f"version {one.versions_T[t]}")
        else:
            assert titles[t] == f"{t}: id {one.tokens_T[t]}, given"
    assert "class='p9 v3'" in body and "class='p0 v4'" in body  # unlikely, and of new weights


def test_rewards_advantages_and_the_gradient_step_are_those_of_the_pool(tmp_path):
    words = "".join(read(page_of(pool_at(tmp_path), shown=Shown(batches=3))).words)
    for batch, state in ((0, "trained"), (1, "trained"), (2, "taken")):
        told = words.split(f"Gradient step {batch}")[1].split("Gradient step")[0]
        assert f"state{state}" in told and "groups2" in told
        assert ("loss0.125" in told) == (batch < 2)
        assert told.count("reward 0, advantage -0.5, done") == (batch < 2)
        assert told.count("reward 1, advantage +0.5, done") == (batch < 2)
        assert told.count("reward 1, not trained, done") == (1 if batch < 2 else 2)
        assert told.count("right1") == 2 and told.count("mean reward 0.5") == 2


def test_what_is_left_out_is_said(tmp_path):
    body = page_of(pool_at(tmp_path), shown=Shown(batches=1, groups=1, tokens=4))
    assert "2 of 3 batches are not shown (--batches)" in body
    assert "1 of 2 groups are not shown (--groups)" in body
    assert body.count("2 of 6 tokens are not shown (--tokens)") == 2
    assert "Gradient step 2" in body and "Gradient step 1" not in body
    assert "not shown" not in page_of(tmp_path, shown=Shown(batches=3))


def test_pruned_batches_keep_their_rewards(tmp_path):
    pool_at(tmp_path)
    with Pool(tmp_path, run="a run", rules=Rules(groups=2)) as pool:
        pool.prune(1)
    body = page_of(tmp_path, shown=Shown(batches=3))
    assert body.count("were pruned") == 1
    assert len(read(body).titles) == 2 * 4 * 6
    assert "reward 1, advantage" in "".join(read(body).words).split("Gradient step 1")[0]


def test_nothing_is_loaded_or_run(tmp_path):
    body = page_of(pool_at(tmp_path))
    assert "default-src 'none'" in body
    assert not re.search(r"https?:|url\(|@import|<script|<link|src=|href=", body)


def test_the_command_writes_the_file_while_the_run_goes_on(tmp_path):
    from glm45_jax.tokenizer import train_bpe

    pool_at(tmp_path / "pool")
    train_bpe(["a few words, for a small vocabulary of ids"], 300).save(tmp_path)
    with Pool(tmp_path / "pool", run="a run", rules=Rules(groups=2)):
        command = [sys.executable, "-m", "glm45_jax.rl.viewer", str(tmp_path / "pool")]
        out = tmp_path / "page.html"
        subprocess.run([*command, "--out", str(out), "--batches", "1"], cwd=ROOT, check=True)
        assert "Gradient step 2" in out.read_text()
        main([str(tmp_path / "pool"), "--out", str(out), "--tokenizer", str(tmp_path)])
    assert ">+</span>" in out.read_text()  # id 10 of a byte-level vocabulary
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "pool", "tokenizer.json"]


def test_a_folder_without_a_pool_is_one_line_and_no_file(tmp_path):
    with pytest.raises(SystemExit, match="give the folder of a pool"):
        main([str(tmp_path), "--out", str(tmp_path / "a.html")])
    with pytest.raises(FileNotFoundError):
        write_page(tmp_path, tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_samples_without_drawn_tokens_are_shown(tmp_path):
    with Pool(tmp_path, run="r", rules=Rules(groups=1), filters=()) as pool:
        pool.add([Prompt("e", 0, 1, "k")])
        (lease,) = pool.lease(1, version=0)
        one = sample("k", 0, n=2)
        one = dataclasses.replace(one, messages=(), parts={}, sampled_T=np.zeros(2, np.bool_))
        pool.commit(lease, [one])
        pool.take(0)
    assert "0 drawn by weights of version none at temperature 1" in page_of(tmp_path)
