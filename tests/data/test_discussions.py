"""Laws of joined issues, pull requests and commits: what belongs together stands together."""

import gzip
import itertools
import json
import random
import time

import pytest

from glm45_jax.data.discussions import SWE_BENCH, Discussions, linked
from glm45_jax.values import from_json, to_json
from tests.data.common import run

DIFF = """diff --git a/{0} b/{0}
--- a/{0}
+++ b/{0}
@@ -1 +1 @@
-leak()
+keep()
"""
ADA, BOB, ROBOT = ({"login": n, "type": t} for n, t in
                   (("ada", "User"), ("bob", "User"), ("dependabot[bot]", "Bot")))  # fmt: skip


def said(body, at, user=ADA, **more):
    return {"body": body, "user": user, "created_at": at, **more}


def story(repo="ann/tool", issue=12, pull=34):
    """The records of one fix: two issues, a pull request, two commits."""
    first = said("It leaks.\r\n<!-- what do you see? -->", "2024-01-01")
    first |= {"type": "issue", "repo": repo, "number": issue, "title": "A leak"}
    first["comments"] = [said("Me too.", "2024-01-03", BOB), said("Since when?", "2024-01-02"),
                         said("Stale.", "2024-01-04", ROBOT), said(" ", "2024-01-05")]  # fmt: skip
    second = said("Grows.", "2023-12-01") | {"type": "issue", "repo": repo, "number": issue - 1}
    second |= {"title": "Memory", "comments": 3}
    proposed = said(f"Fixes #{issue}, see also #{issue - 1}.", "2024-01-05", BOB)
    proposed |= {"type": "pull", "repo": repo, "number": pull, "title": "Keep pages"}
    proposed |= {"merged_at": "2024-01-06", "commits": [f"a{pull}", {"sha": f"b{pull}"}]}
    proposed["review_comments"] = [said("Why not free?", "2024-01-05", path="tool.c")]
    changes = [{"type": "commit", "repo": repo, "sha": f"{letter}{pull}",
                "message": f"Step {letter}\n\nSigned-off-by: A <a@b.c>",
                "diff": DIFF.format(path)}
               for letter, path in (("a", "tool.c"), ("b", "page.c"))]  # fmt: skip
    return [first, second, proposed, *changes]


def read(folder, rows, name="crawl.jsonl", **fields):
    folder.mkdir(parents=True, exist_ok=True)
    data = b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
                    for line in rows)  # fmt: skip
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return run(Discussions(str(folder), **fields))


def changed(**fields):
    """The story with other fields of its pull request."""
    rows = story()
    rows[2] |= fields
    return rows


def test_what_belongs_together_stands_in_the_order_in_which_it_happened(tmp_path):
    (doc,), counts = read(tmp_path, story())
    order = ["Issue #11: Memory\n\nGrows.", "Issue #12: A leak\n\nIt leaks.", "Since when?",
             "Me too.", "Pull request #34: Keep pages\n\nFixes #12", "Comment on tool.c:\nWhy not",
             "Commit: Step a\n\ndiff --git a/tool.c", "+keep()", "Commit: Step b\n\n"]  # fmt: skip
    places = [doc.text.index(part) for part in order]
    assert places == sorted(places)
    for absent in ("Stale", "what do you see", "Signed-off", "\r", "ada", "bob"):
        assert absent not in doc.text
    assert doc.id == "ann/tool#34" and doc.meta["group"] == "ann/tool#11"
    assert (counts["documents"], counts["joined_issues"], counts["joined_commits"]) == (1, 2, 2)
    assert (counts["issues"], counts["pulls"], counts["commits"]) == (2, 1, 2)


def test_the_order_of_the_records_changes_nothing(tmp_path):
    rows = story() + story(issue=52, pull=60) + story("eve/other")
    whole = read(tmp_path / "0", rows)
    assert [doc.id for doc in whole[0]] == ["ann/tool#34", "ann/tool#60", "eve/other#34"]
    for seed in range(1, 4):
        random.Random(seed).shuffle(rows)
        assert read(tmp_path / str(seed), rows, "crawl.jsonl.gz") == whole


@pytest.mark.parametrize(
    "rows, why",
    [
        (changed(merged_at=None), "not_merged"),
        (changed(user=ROBOT), "bot"),
        (changed(body="Tidies up."), "no_issue"),
        (changed(commits=[]), "no_commit"),
        (story("django/django"), "repository"),
        (story()[:3] + [row | {"diff": ""} for row in story()[3:]], "no_diff"),
        (story()[:3] + [row | {"diff": DIFF.format("uv.lock")} for row in story()[3:]],
         "only_generated_or_binary"),
        (changed(body="Fixes #12 " + "words " * 20_000), "too_long"),
        (changed(body="Fixes #12 with \0"), "mis_encoded"),
        (changed(body="Fixes #12, key ghp_" + "a1B2" * 9), "secret"),
        (changed(body="Fixes #12 \ud800"), "not_unicode"),
    ],
)  # fmt: skip
def test_a_pull_request_that_teaches_little_is_left_out_and_counted(rows, why, tmp_path):
    docs, counts = read(tmp_path, rows)
    assert not docs and counts[f"pull_{why}"] == 1 and counts["documents"] == 0


def test_a_lock_file_goes_and_the_rest_of_the_commit_stays(tmp_path):
    rows = story()
    rows[4]["diff"] = DIFF.format("uv.lock") + DIFF.format("page.c")
    (doc,), counts = read(tmp_path, rows)
    assert "page.c" in doc.text and "uv.lock" not in doc.text and counts["diffs_dropped"] == 1


@pytest.mark.parametrize("message", ["Merge pull request #34 from ann/x\n\nKeep", "Keep (#34)"])
def test_commits_that_the_pull_does_not_list_are_found_by_what_a_merge_writes(message, tmp_path):
    rows = changed(commits=3)[:3]
    rows += [{"type": "commit", "repo": "ann/tool", "sha": "c", "message": message,
              "diff": DIFF.format("tool.c")}]  # fmt: skip
    (doc,), _ = read(tmp_path, rows)
    assert doc.text.count("Commit: ") == 1
    rows[3]["message"], rows[2]["merge_commit_sha"] = "Keep", "c"
    assert len(read(tmp_path, rows)[0]) == 1


def test_pulls_without_an_issue_and_repositories_of_swe_bench_can_be_asked_for(tmp_path):
    assert read(tmp_path, changed(body=""), needs_issue=False)[0][0].meta["group"] == "ann/tool#34"
    assert len(read(tmp_path, story(SWE_BENCH[0]), without=())[0]) == 1


@pytest.mark.parametrize(
    "text, closed, named",
    [
        ("Fixes #1, closes: #2 and resolved #3", [1, 2, 3], [1, 2, 3]),
        ("see #4; fix #5", [5], [5, 4]),
        ("fixes a/b#6 and x/y#7", [6], [6]),
        ("closes https://github.com/a/b/issues/8, https://github.com/x/y/issues/9", [8], [8]),
        ("```\nfixes #10\n```\n`fixes #11` colour &#39; is#12 prefixes #13 #14a", [], [13]),
        ("", [], []),
    ],
)
def test_links_are_those_a_reader_would_follow(text, closed, named):
    assert linked("a/b", text, references=False) == closed
    assert linked("a/b", text) == named


def test_hostile_text_takes_no_longer_than_its_size():
    for text in ("<!--", "a.", "```\n", "`", "#1 ", "fixes ", "a/"):
        began = time.monotonic()
        linked("a/b", text * (200_000 // len(text)))
        assert time.monotonic() - began < 2


def test_bad_records_are_counted_and_the_others_stay(tmp_path):
    bad = [b"{broken\n", b"\xff\n", b"[]\n", b"\n", {"type": "star", "repo": "a/b"},
           {"type": "issue", "repo": 3}, {"type": "issue", "repo": "a/b", "number": True},
           {"type": "commit", "repo": "a/b", "sha": 5}]  # fmt: skip
    odd = {"type": "pull", "repo": "a/b", "number": 1, "body": 5, "commits": [None, 3, {}],
           "comments": "x", "user": "me", "merged_at": 1}  # fmt: skip
    docs, counts = read(tmp_path, [*itertools.chain(*zip(bad, story(), strict=False)), odd,
                                   *bad[5:]])  # fmt: skip
    assert [doc.id for doc in docs] == ["ann/tool#34"]
    assert counts["records_in"] == sum(
        counts[name] for name in ("issues", "pulls", "commits")
    ) + sum(n for name, n in counts.items() if name.startswith("dropped_"))
    left_out = [counts[name] for name in ("pull_no_issue", "dropped_no_kind", "dropped_no_key")]
    assert left_out == [1, 2, 2]


def test_a_file_of_too_much_is_cut_and_counted(tmp_path):
    docs, counts = read(tmp_path, story() * 3, max_file_chars=1200)
    assert len(docs) == 1 and counts["dropped_file_too_large"] > 0


def test_a_source_of_discussions_is_a_value(tmp_path):
    source = Discussions(str(tmp_path))
    assert from_json(to_json(source)) == source
    with pytest.raises(ValueError, match="no file"):
        source.version()
