"""What came of builds of the whole corpus: their funnel, and whether they are the same.

    python -m glm45_jax.data.local --out TEXT
    for out in A B; do
      python -m glm45_jax.data.pipeline experiments.corpus:recipe --sources TEXT --out $out \
        --tokenizer tokenizer.json
    done
    python -m experiments.bench.corpus A B

writes the funnel of the first to the result file and docs/images/corpus_funnel.png. Exit code 1
where two builds differ in a byte of what they wrote.
"""

import argparse
import collections
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from experiments.bench.results import cpu_name, merge_result

FIGURE = Path("docs/images/corpus_funnel.png")
COUNTS = ("docs_in", "docs_out", "chars_out", "tokens_out")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below, by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {}
    for path in files:
        with open(path, "rb") as file:
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def funnel(folder: Path) -> dict[str, Any]:
    """Counts of every step of every line, summed over sources, and the digest of all documents."""
    written = json.loads((folder / "funnel.json").read_text(encoding="utf-8"))
    steps: dict[str, dict[str, Any]] = {}
    for row in written["rows"]:
        line = steps.setdefault(row["line"], {})
        total = line.setdefault(row["step"], collections.Counter())
        total.update({name: row[name] for name in COUNTS})
    reads: collections.Counter[str] = collections.Counter()
    for row in written["classes"]:
        reads[row["line"]] += row["read_tokens"]
    return {"digest": written["digest"], "steps": steps, "tokens_an_epoch_reads": reads}


def main() -> None:
    """Compares, writes, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("built", type=Path, nargs="+", help="folders that the pipeline wrote")
    folders = parser.parse_args().built
    first, *rest = found = [digests(folder) for folder in folders]
    differ = sorted({name for other in rest for name in first | other
                     if first.get(name) != other.get(name)})  # fmt: skip
    value = {
        "command": "python -m experiments.bench.corpus " + " ".join("AB"[: len(folders)]),
        "builds": len(folders),
        "files": len(first),
        "files_that_differ": differ,
        **funnel(folders[0]),
    }
    merge_result(cpu_name(), "corpus", value)
    shutil.copyfile(folders[0] / "funnel.png", FIGURE)
    print(f"{len(found)} builds of {len(first)} files, {len(differ)} differ {differ[:9]}")
    print(f"documents {value['digest']}; the funnel is in {folders[0] / 'funnel.txt'} and {FIGURE}")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
