"""Laws of joined repositories: dependencies first, no file and no character lost or made up."""

import json
import os
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45_jax.data.fim import Fim, Mark, WithFim, unfim_ids
from glm45_jax.data.prepare import Data, prepare
from glm45_jax.data.repositories import Checkouts, Repositories, dependencies, join, order
from glm45_jax.data.sources import PythonSources
from glm45_jax.values import from_json, to_json
from tests.data.common import run

NAMES = [f"{letter}.py" for letter in "abcdefgh"]
GRAPHS = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES))).map(
    lambda edges: {n: tuple(sorted({b for a, b in edges if a == n != b})) for n in NAMES}
)
FILES = st.lists(st.text("ab\n\r\fé漢 ", min_size=1, max_size=90), max_size=12).map(
    lambda texts: [(f"f{at}.py", text) for at, text in enumerate(texts)]
)
OPTAX = Repositories(PythonSources(include=("site",), packages=("optax",)))


def contents(docs):
    """Text of every file by (repository, path), its parts joined."""
    found = {}
    for doc in docs:
        for path, begin, end in json.loads(doc.meta["files"]):
            key = doc.meta["repo"], path
            found[key] = found.get(key, "") + doc.text[begin:end]
    return found


def plant(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Checkouts(str(root))


def reachable(needs):
    """For every path all that it needs, over any number of steps."""
    found = {path: set(direct) for path, direct in needs.items()}
    for _ in needs:
        found = {p: ns.union(*(found[n] for n in ns)) for p, ns in found.items()}
    return found


@given(GRAPHS)
def test_what_a_file_needs_comes_first_unless_it_is_needed_back(needs):
    placed = order(needs)
    assert sorted(placed.paths) == sorted(needs)
    place = {path: at for at, path in enumerate(placed.paths)}
    reach = reachable(needs)
    backwards = [(p, n) for p, ns in needs.items() for n in ns if place[n] > place[p]]
    assert all(p in reach[n] for p, n in backwards)
    assert placed.broken == len(backwards)
    in_cycles = {p for p in needs if p in reach[p]}
    cycles = {frozenset(q for q in in_cycles if q in reach[p] and p in reach[q]) for p in in_cycles}
    assert placed.cycles == len(cycles)
    assert (placed.broken > 0) == bool(cycles)


@given(GRAPHS, st.randoms())
def test_the_order_is_a_function_of_the_graph(needs, random):
    shuffled = random.sample(list(needs), len(needs))
    assert order({p: random.sample(needs[p], len(needs[p])) for p in shuffled}) == order(needs)


def test_a_dependency_stands_right_before_its_first_user():
    needs = {"a.py": ("z.py",), "b.py": (), "c.py": ("y.py",), "y.py": (), "z.py": ()}
    assert order(needs).paths == ("z.py", "a.py", "b.py", "y.py", "c.py")


def test_a_cycle_is_entered_where_the_fewest_needs_are_missing():
    needs = {"a.py": ("b.py", "c.py"), "b.py": ("c.py",), "c.py": ("a.py",)}
    assert order(needs) == (("b.py", "a.py", "c.py"), 1, 2)


def test_needs_are_visited_by_path_whatever_order_they_come_in():
    needs = {"a.py": ("c.py", "b.py"), "b.py": (), "c.py": ()}
    assert order(needs).paths == ("b.py", "c.py", "a.py")


def test_no_part_of_a_long_file_shares_a_document_however_short_it_is():
    files = [("a.py", "a\n"), ("b.py", "b\n" + "c" * 60), ("d.py", "d\n")]
    found = ["".join(path for path, _, _ in document.files) for document in join(files, 40)]
    assert found == ["a.py", "b.py", "b.py", "b.py", "d.py"]


def test_a_chain_of_ten_thousand_files_needs_no_recursion():
    needs = {f"{i:05d}.py": (f"{i + 1:05d}.py",) if i < 9999 else () for i in range(10_000)}
    assert order(needs).paths == tuple(sorted(needs, reverse=True))


@given(FILES, st.integers(12, 200))
def test_joining_loses_no_character_and_keeps_the_limit(files, max_chars):
    documents = join(files, max_chars)
    found = {}
    for document in documents:
        end = 0
        for path, begin, stop in document.files:
            assert document.text[end:begin] in (f"# {path}\n", f"\n# {path}\n")
            found[path] = found.get(path, "") + document.text[begin:stop]
            end = stop
        assert document.text[end:] in ("", "\n")
        assert len(document.text) <= max_chars
    assert found == dict(files)
    assert list(found) == [path for path, _ in files]


@given(FILES, st.integers(20, 200))
def test_a_document_ends_at_a_file_border_or_holds_a_part_of_one_long_file(files, max_chars):
    whole = dict(files)
    for document in join(files, max_chars):
        for path, begin, end in document.files:
            is_whole = document.text[begin:end] == whole[path]
            assert is_whole or len(document.files) == 1


def test_python_imports_are_resolved_as_python_does():
    texts = {
        "src/pkg/__init__.py": "from .core import run\n",
        "src/pkg/core.py": "import os\nfrom . import values\nfrom .sub.deep import x\n",
        "src/pkg/values.py": "def late():\n    import pkg.core\n",
        "src/pkg/sub/__init__.py": "",
        "src/pkg/sub/deep.py": "from ..values import y\nif True:\n    import pkg.sub.other as o\n",
        "src/pkg/sub/other.py": "from pkg import values\nimport pkg.nothing\n",
        "tools/run.py": "import helper\nfrom pkg.core import run\n",
        "tools/helper.py": "",
        "broken.py": "def (:\n",
    }
    graph = dependencies(texts)
    assert graph.unparsed == 1
    assert {path: needs for path, needs in graph.needs.items() if needs} == {
        "src/pkg/__init__.py": ("src/pkg/core.py",),
        "src/pkg/core.py": ("src/pkg/sub/deep.py", "src/pkg/values.py"),
        "src/pkg/sub/deep.py": ("src/pkg/sub/other.py", "src/pkg/values.py"),
        "src/pkg/sub/other.py": ("src/pkg/__init__.py", "src/pkg/values.py"),
        "tools/run.py": ("src/pkg/core.py", "tools/helper.py"),
    }


def test_includes_and_relative_imports_of_other_languages_are_resolved():
    graph = dependencies(
        {
            "src/main.c": '#include <stdio.h>\n#include "util.h"\n  # include "lib/far.h"\n',
            "src/util.h": "",
            "include/lib/far.h": "",
            "web/a.ts": "import {x} from './b';\nimport '../web/c/';\nconst r = require('react');",
            "web/b.ts": "",
            "web/c/index.js": "const b = require('../b')",
            "notes.md": "import './b'",
        }
    )
    assert {path: needs for path, needs in graph.needs.items() if needs} == {
        "src/main.c": ("include/lib/far.h", "src/util.h"),
        "web/a.ts": ("web/b.ts", "web/c/index.js"),
        "web/c/index.js": ("web/b.ts",),
    }


def test_an_installed_package_goes_through_whole_and_in_order():
    docs, counts = run(OPTAX)
    assert (docs, counts) == run(OPTAX)
    files = {("optax", file.id): file.path.read_text() for file in OPTAX.trees.files()}
    found = contents(docs)
    assert found == {key: text for key, text in files.items() if key in found}
    assert counts["files_in"] == len(files) and counts["files_kept"] == len(found) > 50
    dropped = sum(n for key, n in counts.items() if key.startswith("dropped_"))
    assert counts["files_in"] == counts["files_kept"] + dropped
    assert counts["documents"] == len(docs) and counts["edges"] > 100
    assert all(len(doc.text) <= OPTAX.max_chars for doc in docs)
    place = {path: at for at, (_, path) in enumerate(found)}
    needs = dependencies({path: text for (_, path), text in found.items()}).needs
    late = [(p, n) for p, ns in needs.items() for n in ns if place[n] > place[p]]
    assert len(late) == counts["edges_broken"]
    assert all(doc.text.startswith(f"# {doc.meta['path']}\n") for doc in docs)


def test_hostile_files_are_counted_and_never_followed(tmp_path):
    good = "import b\nx = 1\n"
    trees = plant(
        tmp_path,
        {
            "r/a.py": good,
            "r/b.py": "import a\r\n# no line end",
            "r/syntax.py": "def f(:\n    <|code_prefix|>\n",
            "r/nested.py": "x = " + "(\n" * 5000,
            "r/minus.py": "x = \\\n" + "-\\\n" * 3000 + "1\n",
            "r/empty.py": "",
            "r/blank.py": " \n\t\n",
            "r/latin.py": b"name = 'caf\xe9'\n",
            "r/nul.py": b"x = 'a\0b'\n",
            "r/line.py": "x = '" + "a" * 5_000_000 + "'\n",
            "r/wide.py": "x = '" + "a b " * 500 + "'\n",
            "r/photo.png": b"\x89PNG",
            "r/new\nline.py": "x = 1\n",
            "r/.git/config.py": "hidden",
            "s/only.txt": "of no language",
        },
    )
    (tmp_path / "r" / "loop").symlink_to(tmp_path / "r")
    (tmp_path / "r" / "link.py").symlink_to("a.py")
    (tmp_path / "r" / "gone.py").symlink_to("nowhere")
    os.mkfifo(tmp_path / "r" / "pipe.py")
    docs, counts = run(Repositories(trees))
    kept = {path: text for (_, path), text in contents(docs).items()}
    assert kept["b.py"] == "import a\r\n# no line end"
    assert {"a.py", "b.py", "syntax.py"} <= set(kept)
    dropped = {key: n for key, n in counts.items() if key.startswith("dropped_")}
    assert dropped.pop("dropped_few_alphanumeric") == 2  # nested.py, minus.py
    assert dropped == {
        "dropped_blank": 2,
        "dropped_not_utf8": 1,
        "dropped_mis_encoded": 1,
        "dropped_too_large": 1,
        "dropped_long_line": 1,
        "dropped_other_kind": 2,
        "dropped_bad_name": 1,
        "dropped_symlink": 3,
        "dropped_not_a_file": 1,
    }
    assert counts["files_in"] == counts["files_kept"] + sum(dropped.values()) + 2
    assert (counts["unparsed"], counts["cycles"], counts["edges_broken"]) == (1, 1, 1)
    loose = run(Repositories(trees, rules=None))
    assert loose[1]["unparsed"] >= 2  # also what is nested too deep, and NUL
    assert len(contents(loose[0])["r", "line.py"]) == 5_000_007


def test_another_file_another_version(tmp_path):
    trees = plant(tmp_path, {"r/a.py": "x = 1\n"})
    before = trees.version()
    plant(tmp_path, {"r/sub/b.py": "y = 2\n"})
    assert trees.version() != before
    with pytest.raises(ValueError, match="has no folder; give the folder that holds the repos"):
        list(Checkouts(str(tmp_path / "r" / "sub")).files())
    with pytest.raises(ValueError, match="max_tokens 0 "):
        Repositories(trees, max_tokens=0)


def test_an_experiment_reads_repositories_with_infilling_of_last_files(tmp_path):
    repos = {
        f"r{i}/{name}.py": f"import {other}\n\ndef {name}_{i}(x):\n    return x + {i}\n"
        for i in range(12)
        for name, other in pairwise("wxyz")
    }
    trees = plant(tmp_path / "all", repos)
    source = Repositories(trees, max_tokens=35)
    data = Data(sources=((WithFim(source, Fim(rate=1.0)), 1.0),), vocab=310, val_fraction=0.2)
    assert from_json(to_json(data)) == data
    found = prepare(data, tmp_path / "cache")
    docs = run(source)[0]
    assert len(docs) > 12  # some repositories in several documents
    texts, repos_of = Counter(), {}
    for split, stores in (("train", found.train), ("val", found.val)):
        store = stores["repositories"]
        for start, stop in pairwise(store.offsets_N1.tolist()):
            ids = store.read(start, stop).tolist()[:-1]
            text = unfim_ids(ids, found.tokenizer)
            texts[text] += 1
            doc = next(doc for doc in docs if doc.text == text)
            repos_of.setdefault(split, set()).add(doc.meta["repo"])
            context = found.tokenizer.decode(
                ids[: ids.index(found.tokenizer.id_of(Mark.PREFIX.value))]
            )
            assert context == text[: int(doc.meta["infill_from"])]
    assert texts == Counter(doc.text for doc in docs)
    assert repos_of["val"] and not repos_of["val"] & repos_of["train"]
    read = found.report["read"]["repositories"]
    assert read["repositories"] == 12 and read["files_kept"] == 36 and read["edges"] == 24
    assert replace(source, rules=None).version() != source.version()
