"""Issues, pull requests and commits that belong together, as one document: what was wrong, what was
proposed, what was said about it, and the change as a diff.

`Discussions` reads what a crawl of a forge leaves: JSON lines with the fields of GitHub's REST API,
all records of a repository in one file. Packages ship no such records (their patches and change
logs are read by `data/commits.py` and `data/changelogs.py`), so this source has no default.
Source: spec 6.3 (D17), whose record and filters are a CHOICE; the model filter is another step.
"""

import re
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from glm45_jax.data.commits import BOT, Commit, parse_commit
from glm45_jax.data.files import FILES_FORMAT, KEYS, Limits, Record, json_records, records
from glm45_jax.data.reading import DroppedError, Ledger, check_text, match_files
from glm45_jax.data.rules import CodeRules, generated_name, mis_encoded, secret
from glm45_jax.data.sources import Doc, digest_files

DISCUSSIONS_FORMAT = 1  # raise it when the same files give other documents
KINDS = ("issue", "pull", "commit")

# Repositories whose issues are the tasks of SWE-bench: spec 6.3 wants them left out.
SWE_BENCH = (
    "astropy/astropy", "django/django", "matplotlib/matplotlib", "mwaskom/seaborn",
    "pallets/flask", "psf/requests", "pydata/xarray", "pylint-dev/pylint", "pytest-dev/pytest",
    "scikit-learn/scikit-learn", "sphinx-doc/sphinx", "sympy/sympy",
)  # fmt: skip


@dataclass(frozen=True)
class Discussions:
    """One document a merged pull request of every repository, with the issues that it names.

    A record: {"type": "issue" | "pull" | "commit", "repo": "owner/name"} and, of issues and pulls,
    "number", "title", "body", "user", "created_at", "comments" (a list of {"body", "user",
    "created_at"}); of pulls also "merged_at", "merge_commit_sha", "commits" (shas or objects with
    one) and "review_comments" (comments with a "path"); of commits "sha", "message" and "diff", as
    git prints it. Others are let be.

    without: repositories that are left out. references: whether a plain #12 links too, beside the
    words that close an issue. needs_issue: leave out pulls that name none. max_chars: of a document
    (32K tokens at 3 characters); limits: of a record; max_file_chars: of one file's records.
    """

    root: str
    pattern: str = "**/*.jsonl*"
    name: str = "discussions"
    without: tuple[str, ...] = SWE_BENCH
    references: bool = True
    needs_issue: bool = True
    max_chars: int = 98_304
    max_files: int = 100
    max_file_chars: int = 2**30
    limits: Limits = Limits()
    licence: str = ""

    def version(self) -> str:
        """A digest of paths, sizes and times, and the format of the documents."""
        files = digest_files(match_files(self.root, self.pattern))
        return f"{files} files={FILES_FORMAT} discussions={DISCUSSIONS_FORMAT}"

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """By file, repository and number of the pull request.

        Returns counts: those of files (`data/files.py`), issues, pulls, commits read; dropped_* of
        records by reason; pull_* of pulls that are left out, by reason (repository, not_merged,
        bot, no_issue, no_commit, no_diff, only_generated_or_binary, many_files, too_long, secret);
        joined_issues and joined_commits, diffs_dropped of those that stay.

        Raises: ValueError when no file matches.
        """
        ledger = Ledger(self.name, *KEYS, "issues", "pulls", "commits")
        found = records(self, ledger, lambda path: json_records(path, self.limits))
        for where, group in groupby(found, key=lambda pair: pair[0]):
            repos: dict[str, _Repo] = {}
            chars = 0
            for _, record in group:
                try:
                    chars += self._file_away(record, repos, ledger.counts)
                    if chars > self.max_file_chars:
                        raise DroppedError("file_too_large")
                except DroppedError as error:
                    ledger.drop(DroppedError(str(error), record.number), where)
            for name in sorted(repos):
                yield from self._joined(name, repos[name], ledger)
        return ledger.report()

    def _file_away(
        self, record: Record, repos: "dict[str, _Repo]", counts: Counter[str]
    ) -> int:  # fmt: skip
        """Keeps a record with its repository; returns how many characters it has."""
        if isinstance(record.value, DroppedError):
            raise record.value
        value = record.value
        kind, name = value.get("type"), value.get("repo")
        if kind not in KINDS or not isinstance(name, str):
            raise DroppedError("no_kind")
        repo = repos.setdefault(name, _Repo())
        key = value.get("sha" if kind == "commit" else "number")
        if type(key) is not (str if kind == "commit" else int):  # True is no number
            raise DroppedError("no_key")
        counts[f"{kind}s"] += 1
        getattr(repo, f"{kind}s")[key] = value
        return sum(len(text) for text in _texts(value))

    def _joined(self, name: str, repo: "_Repo", ledger: Ledger) -> Iterator[Doc]:
        repo.link_commits()
        for number in sorted(repo.pulls):
            try:
                doc = self._doc(name, repo, repo.pulls[number], ledger.counts)
            except DroppedError as error:
                ledger.drop(error, f"{name}#{number}", "pull_")
                continue
            ledger.counts["documents"] += 1
            yield doc

    def _doc(
        self, name: str, repo: "_Repo", pull: Mapping[str, Any], counts: Counter[str]
    ) -> Doc:  # fmt: skip
        if name in self.without:
            raise DroppedError("repository")
        if not pull.get("merged_at"):
            raise DroppedError("not_merged")
        if _bot(pull):
            raise DroppedError("bot")
        commits = repo.commits_of(pull)
        said = [_text(pull, "title"), _text(pull, "body"), *(c.message for c in commits)]
        numbers = linked(name, "\n".join(said), references=self.references)
        issues = [repo.issues[n] for n in numbers if n in repo.issues]
        issues.sort(key=lambda issue: (_text(issue, "created_at"), issue["number"]))
        if self.needs_issue and not issues:
            raise DroppedError("no_issue")
        changes, paths, left_out = self._changes(commits)
        parts = [*map(_issue, issues), _pull(pull), *changes]
        text = check_text("\n\n".join(parts), self.limits.max_line)
        if len(text) > self.max_chars:
            raise DroppedError("too_long")
        group = min([issue["number"] for issue in issues], default=pull["number"])
        meta = {"repo": name, "path": paths[0], "licence": self.licence}
        doc = Doc(f"{name}#{pull['number']}", text, self.name, meta | {"group": f"{name}#{group}"})
        for rule in (mis_encoded, secret):
            if rule(doc, CodeRules()):
                raise DroppedError(rule.__name__)
        counts.update(joined_issues=len(issues), joined_commits=len(changes))
        counts["diffs_dropped"] += left_out
        return doc

    def _changes(self, commits: Sequence[Commit]) -> tuple[list[str], list[str], int]:
        """Text of each commit that changes what people write, their files, and how many other
        files they change.
        """
        if not commits:
            raise DroppedError("no_commit")
        if not any(commit.diffs for commit in commits):
            raise DroppedError("no_diff")
        changes, paths, left_out = [], [], 0
        for commit in commits:
            kept = [d for d in commit.diffs if not d.binary and not generated_name(d.path)]
            left_out += len(commit.diffs) - len(kept)
            if kept:
                paths += [diff.path for diff in kept]
                changes.append(f"Commit: {commit.message}\n\n" + "".join(d.text for d in kept))
        if not changes:
            raise DroppedError("only_generated_or_binary")
        if len(set(paths)) > self.max_files:
            raise DroppedError("many_files")
        return changes, paths, left_out


def linked(repo: str, text: str, *, references: bool = True) -> list[int]:
    """Numbers of issues of `repo` that a text closes, or names at all, each once, in their order.

    Closing: close, fix or resolve in any form before #12, owner/name#12 or the address of an issue.
    What stands in code does not count.
    """
    prose = _CODE.sub(" ", text)
    found = _CLOSES.finditer(prose)
    closed = [match for match in found if match["repo"] in (None, repo)]
    named = [m for m in _NAMES.finditer(prose) if m["repo"] in (None, repo)] if references else []
    return list(dict.fromkeys(int(match["number"]) for match in (*closed, *named)))


@dataclass
class _Repo:
    """The records of one repository. of_pull: shas of commits by number of the pull request."""

    issues: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    pulls: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    commits: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    of_pull: dict[int, list[str]] = field(default_factory=dict)

    def link_commits(self) -> None:
        """To the pull requests that their messages name, as a merge or a squash writes it."""
        for sha, commit in self.commits.items():
            message = _text(commit, "message")
            found = _MERGE.match(message) or _SQUASHED.search(message.partition("\n")[0])
            if found:
                self.of_pull.setdefault(int(found[1]), []).append(sha)

    def commits_of(self, pull: Mapping[str, Any]) -> list[Commit]:
        """In the order in which the pull lists them; else those that name it. A merge commit has
        the changes of the others, so it stands only where there are none.
        """
        listed = pull.get("commits")
        listed = listed if isinstance(listed, list) else []
        shas = [one.get("sha") if isinstance(one, Mapping) else one for one in listed]
        named = [*self.of_pull.get(pull["number"], ()), pull.get("merge_commit_sha")]
        for candidates in (shas, named):
            known = [self.commits[s] for s in dict.fromkeys(candidates) if s in self.commits]
            if known:
                return [_commit(record) for record in known]
        return []


def _commit(record: Mapping[str, Any]) -> Commit:
    message = _NOISE.sub("", _text(record, "message")).strip()
    return Commit(record["sha"], "", message, parse_commit(_text(record, "diff")).diffs)


def _issue(issue: Mapping[str, Any]) -> str:
    head = f"Issue #{issue['number']}: {_text(issue, 'title')}".rstrip()
    return "\n\n".join([head, *_body(issue), *_comments(issue, "comments")])


def _pull(pull: Mapping[str, Any]) -> str:
    head = f"Pull request #{pull['number']}: {_text(pull, 'title')}".rstrip()
    said = [*_comments(pull, "comments"), *_comments(pull, "review_comments")]
    return "\n\n".join([head, *_body(pull), *said])


def _body(record: Mapping[str, Any]) -> list[str]:
    body = _without_hints(_text(record, "body")).replace("\r\n", "\n").strip()
    return [body] if body else []


def _without_hints(text: str) -> str:
    """Without comments of HTML, in which forges tell people what to write."""
    parts, at = [], 0
    while (begin := text.find("<!--", at)) >= 0 and (end := text.find("-->", begin)) >= 0:
        parts.append(text[at:begin])
        at = end + 3
    return "".join([*parts, text[at:]])


def _comments(record: Mapping[str, Any], key: str) -> list[str]:
    """What people said, in the order of time; names are not given."""
    given = record.get(key)
    comments = [one for one in given if isinstance(one, Mapping)] if isinstance(given, list) else []
    comments = [one for one in comments if _body(one) and not _bot(one)]
    comments.sort(key=lambda one: _text(one, "created_at"))
    found = []
    for comment in comments:
        path = _text(comment, "path")
        found.append(f"Comment{' on ' + path if path else ''}:\n{_body(comment)[0]}")
    return found


def _bot(record: Mapping[str, Any]) -> bool:
    user = record.get("user")
    user = user if isinstance(user, Mapping) else {}
    return user.get("type") == "Bot" or bool(BOT.search(_text(user, "login")))


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    return value if isinstance(value, str) else ""


def _texts(value: Any) -> Iterator[str]:
    """All texts inside a JSON value."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


_PLACE = r"(?:(?:https?://[\w.-]+/)?(?P<repo>[\w.-]+/[\w.-]+)(?:#|/issues/)|#)(?P<number>\d{1,9})\b"
_CLOSES = re.compile(rf"\b(?:close[sd]?|fix(?:e[sd])?|resolve[sd]?):?\s+{_PLACE}", re.IGNORECASE)
_NAMES = re.compile(rf"(?<![\w.&/#-]){_PLACE}")
_CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_MERGE = re.compile(r"Merge pull request #(\d{1,9})\b")
_SQUASHED = re.compile(r"\(#(\d{1,9})\)\s*$")
_NOISE = re.compile(r"^(?:Signed-off-by|Co-authored-by|Reviewed-by):.*\n?", re.MULTILINE)
