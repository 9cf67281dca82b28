"""Laws of commits: every diff byte for byte, nothing made up, nothing lost without a count."""

import subprocess

import pytest

from glm45_jax.data.commits import Commits, parse_commit, split_history
from tests.data.common import run

HUNK = "@@ -1,3 +1,3 @@ def f():\n one\n-two\n+TWO <|code_prefix|>\f\u2028more\n three\n"
DIFF = f"diff --git a/x.py b/x.py\nindex 1234567..89abcde 100644\n--- a/x.py\n+++ b/x.py\n{HUNK}"
PATCH = f"""From {"ab" * 20} Mon Sep 17 00:00:00 2001
From: Some One <some@one.org>
Date: Thu, 1 Jan 2026 00:00:00 +0000
Subject: [PATCH 1/2] x: a subject that is so
 long that it is folded

Why it is done.

Signed-off-by: Some One <some@one.org>
---
 x.py | 2 +-
 1 file changed

{DIFF}--{" "}
2.39.2
"""


def test_a_mailed_patch_gives_its_words_and_its_diff():
    commit = parse_commit(PATCH)
    assert commit.id == "ab" * 20
    assert commit.message == ("x: a subject that is so long that it is folded\n\nWhy it is done.")
    assert [(diff.path, diff.text) for diff in commit.diffs] == [("x.py", DIFF)]


def test_a_missing_line_end_belongs_to_the_diff():
    diff = DIFF.replace(" three\n", " three\n\\ No newline at end of file\n")
    assert [found.text for found in parse_commit("words\n" + diff + DIFF).diffs] == [diff, DIFF]


def test_a_history_made_by_git_is_read_whole(tmp_path):
    repo, out = tmp_path / "repo", tmp_path / "out"
    repo.mkdir()
    out.mkdir()

    def git(*args):
        who = ["-c", "user.name=A", "-c", "user.email=a@b.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *who, *args], cwd=repo, capture_output=True, check=True)
        return done.stdout.decode()

    git("init", "-q")
    lines = [f"line {i}" for i in range(40)]
    for step in range(4):
        lines[step * 9] += f" changed {step}\f"
        (repo / "a b.py").write_text("\n".join(lines))  # no line end, a space in the name
        (repo / f"new{step}.c").write_text("commit " + "0" * 40 + "\n--- a\n+++ b\n")
        (repo / "image.bin").write_bytes(bytes(range(256)) * (step + 1))
        git("add", "-A")
        git("commit", "-q", "-m", f"step {step}\n\ncommit {'1' * 40}\n\n  indented")
    git("mv", "new0.c", "moved.c")
    git("commit", "-q", "-m", "move")
    log = git("log", "-p")
    assert "".join(split_history(log)) == log and len(split_history(log)) == 5
    (out / "log.diff").write_text(log)
    docs, counts = run(Commits(str(out)))
    assert [doc.text.split("\n")[0] for doc in docs] == ["move", *(f"step {i}" for i in "3210")]
    assert counts["commits_in"] == counts["documents"] == 5 and counts["diffs_dropped"] == 4
    for doc in docs:
        _, *diffs = doc.text.split("diff --git")
        assert all("diff --git" + diff in log for diff in diffs)  # byte for byte
        assert "a@b.org" not in doc.text and not any("image.bin" in diff for diff in diffs)
    assert [doc.meta["commit"] for doc in docs] == git("log", "--format=%H").split()
    assert "rename to moved.c" in docs[0].text
    # As mails the same commits say the same.
    git("format-patch", "--root", "-o", str(tmp_path / "mail"))
    mailed, _ = run(Commits(str(tmp_path / "mail")))
    assert [doc.text for doc in reversed(mailed)] == [doc.text for doc in docs]


BAD = {
    "no_message": DIFF,
    "no_diff": "only words\n",
    "bad_hunk": "words\n\n" + DIFF.replace(" three\n", "three\n"),
    "bot": PATCH.replace("Some One", "dependabot[bot]"),
    "only_generated_or_binary": "words\n\n" + DIFF.replace("x.py", "yarn.lock"),
    "too_long": "words\n\n--- a\n+++ b\n@@ -0,0 +1,9000 @@\n" + "+a line of text\n" * 9000,
    "secret": "words\n\n" + DIFF.replace("TWO", "AKIA" + "Q3EGRZ7PXN4BTWKA"),
}


@pytest.mark.parametrize("reason", sorted(BAD))
def test_what_is_left_out_is_counted_by_reason(tmp_path, reason):
    (tmp_path / "a.patch").write_text(BAD[reason])
    (tmp_path / "b.patch").write_text(PATCH)
    docs, counts = run(Commits(str(tmp_path)))
    assert [doc.id for doc in docs] == ["b.patch#0"]
    assert counts[f"dropped_{reason}"] == 1 and counts["commits_in"] == 2


def test_hunks_are_measured_by_their_heads_and_cut_ones_are_refused():
    for end in range(len(HUNK.splitlines()) - 1):
        cut = DIFF[: DIFF.index("@@")] + "".join(HUNK.splitlines(keepends=True)[:end])
        with pytest.raises(Exception, match="bad_hunk"):
            parse_commit("words\n\n" + cut)


def test_hostile_files_are_counted(tmp_path):
    (tmp_path / "empty.patch").write_text("")
    (tmp_path / "latin.patch").write_bytes(b"caf\xe9\n" + DIFF.encode())
    (tmp_path / "line.diff").write_text("x" * 5_000_000)
    (tmp_path / "loop.diff").symlink_to(tmp_path / "loop.diff")
    docs, counts = run(Commits(str(tmp_path)))
    assert not docs and counts["files_in"] == 4
    assert [counts[f"dropped_{why}"] for why in ("file_blank", "file_not_utf8", "no_diff")] == [
        1
    ] * 3
    assert counts["dropped_file_symlink"] == 1
    with pytest.raises(ValueError, match=r"no file below .* ends in \.nope"):
        Commits(str(tmp_path), suffixes=(".nope",)).version()
