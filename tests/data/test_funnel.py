"""Laws of the funnel: it adds up, and shows the same twice."""

import json
from itertools import pairwise

import pytest

from glm45_jax.data.funnel import FILES, funnel, main, text, write
from glm45_jax.data.pipeline import READ, build
from glm45_jax.tokenizer import train_bpe
from tests.data.corpora import corpus, everything


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A corpus built in one go, what was built, and all its bytes."""
    made = corpus(tmp_path_factory.mktemp("once"))
    return made, build(made), everything(made.folder)


def test_the_funnel_adds_up_and_is_written_the_same_twice(once, tmp_path):
    made, built, _ = once
    tokenizer = train_bpe((doc.text for doc in made.output("web").docs()), 300)
    found = funnel(made, built, tokenizer)
    by_step = {(r.line, r.step, r.source): r for r in found.rows}
    for line in made.lines:
        for source in line.sources:
            rows = [by_step[line.name, name, source.name] for name in line.names]
            for earlier, later in pairwise(rows):
                assert later.tokens_in == earlier.tokens_out and later.docs_in == earlier.docs_out
        end = [r for r in found.rows if (r.line, r.step) == (line.name, line.names[-1])]
        classes = [c for c in found.classes if c.line == line.name]
        for what in ("docs", "chars", "tokens"):
            left = sum(getattr(r, f"{what}_out") for r in end)
            assert sum(getattr(c, what) for c in classes) == left
    texts = [d.text for d in made.output("web", READ).docs()]
    assert sum(map(len, tokenizer.encode_batch(texts))) == sum(
        r.tokens_out for r in found.rows if (r.line, r.step) == ("web", READ)
    )
    shown = text(found)
    assert built.digest in shown and "(dropped_elsewhere) 2" in shown
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
        assert [path.name for path in write(found, folder)] == list(FILES)
    assert everything(folders[0]) == everything(folders[1])
    assert json.loads((folders[0] / FILES[0]).read_text())["digest"] == built.digest
    assert funnel(made, built).rows[0].tokens_out is None


def test_the_command_builds_shows_and_refuses(once, tmp_path, capsys):
    _, built, _ = once
    where = ["--sources", "anywhere", "--out", str(tmp_path)]
    assert main(["tests.data.corpora:recipe", *where]) == 0
    assert built.digest in capsys.readouterr().out
    assert set(FILES) <= {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / "corpus.json").read_text())["digest"] == built.digest
    assert main(["tests.data.corpora:no_recipe", *where]) == 2
    assert "no_recipe" in capsys.readouterr().err
