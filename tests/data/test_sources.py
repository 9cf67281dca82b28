"""Laws of the sources: same documents every time, nothing lost without a count."""

import ast
import logging
import sysconfig
from pathlib import Path

import pytest

from glm45_jax.data.sources import Docstrings, PackageDocs, PydocTopics, PythonSources, TextFiles
from tests.data.common import run

OPTAX = PythonSources(name="site", include=("site",), packages=("optax",))
OPTAX_PROSE = Docstrings(include=("site",), packages=("optax",))
SOURCES = (
    PythonSources(),
    OPTAX,
    OPTAX_PROSE,
    PydocTopics(),
    PackageDocs(distributions=("numpy", "optax")),
)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_a_source_gives_the_same_documents_in_the_same_order_every_time(source):
    first, second = list(source.docs()), list(source.docs())
    assert first == second and first
    assert source.version() == source.version()
    ids = [doc.id for doc in first]
    assert len(set(ids)) == len(ids)
    assert all(doc.source == source.name and doc.text.strip() for doc in first)
    assert all(doc.meta["path"] and doc.meta["repo"] for doc in first)


def test_the_standard_library_comes_without_tests_and_from_its_own_folder():
    root = Path(sysconfig.get_paths()["stdlib"])
    docs = {doc.id: doc for doc in PythonSources().docs()}
    assert docs["argparse.py"].text == (root / "argparse.py").read_text("utf-8")
    assert docs["json/decoder.py"].meta["licence"] == "PSF-2.0"
    parts = {part for doc_id in docs for part in Path(doc_id).parts[:-1]}
    assert not parts & {"test", "tests", "idle_test", "encodings", "site-packages", "pydoc_data"}
    assert sum(len(doc.text) for doc in docs.values()) > 5_000_000
    assert not [doc.id for doc in OPTAX.docs() if doc.id.endswith("_test.py")]


def test_docstrings_are_long_prose_that_stands_in_the_file_of_the_same_group():
    code = {doc.meta["group"]: doc.text for doc in OPTAX.docs()}
    docs = list(OPTAX_PROSE.docs())
    assert len(docs) > 20
    for doc in docs:
        assert len(doc.text) >= OPTAX_PROSE.min_chars
        first_line = doc.text.splitlines()[0]
        assert first_line in code[doc.meta["group"]]


def test_a_module_docstring_is_taken_whole_and_stands_first():
    prose = {doc.id: doc.text for doc in OPTAX_PROSE.docs()}
    checked = 0
    for doc in OPTAX.docs():
        docstring = ast.get_docstring(ast.parse(doc.text)) or ""
        if len(docstring) >= OPTAX_PROSE.min_chars:
            assert prose[doc.id].startswith(docstring)
            checked += 1
    assert checked > 3


def test_what_a_folder_holds_is_read_or_counted_by_name(tmp_path, caplog):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("good", encoding="utf-8")
    (tmp_path / "deep" / "b.txt").write_text("gut, schön", encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(b"one\n\xff\xfe\x00bad")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "other.md").write_text("not asked for")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    with caplog.at_level(logging.INFO):
        docs, counts = run(TextFiles(str(tmp_path)))
    assert [(doc.id, doc.text) for doc in docs] == [("a.txt", "good"), ("deep/b.txt", "gut, schön")]
    dropped = {"dropped_not_utf8": 1, "dropped_blank": 1, "dropped_symlink": 1}
    assert counts == {"files_in": 5, "documents": 2, **dropped}
    assert "files: bad.txt:2: dropped_not_utf8" in caplog.text and "broken.txt" in caplog.text


def test_an_edited_folder_has_another_version(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    source = TextFiles(str(tmp_path))
    before = source.version()
    (tmp_path / "a.txt").write_text("three")
    assert source.version() != before


def test_a_source_that_cannot_deliver_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"no file in .* matches '\*\.nope'"):
        list(TextFiles(str(tmp_path), pattern="*.nope").docs())
    with pytest.raises(ValueError, match="include has 'all'; use 'stdlib'"):
        PythonSources(include=("all",))
    with pytest.raises(ValueError, match="'no_such_package' is not installed"):
        list(PythonSources(include=("site",), packages=("no_such_package",)).docs())
    with pytest.raises(ValueError, match="no installed distribution is named 'no-such-dist'"):
        list(PackageDocs(distributions=("no-such-dist",)).docs())
