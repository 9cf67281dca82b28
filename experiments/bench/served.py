"""The steps of the corpus that need a served model, with one: D14, D18 and D20 of spec 6.

    python -m glm45_jax.hf.smollm2 corpus/smollm2
    python -m glm45_jax.rollout.server --checkpoint corpus/smollm2 --port 8000 &
    python -m glm45_jax.data.local --out text
    python -m experiments.bench.served --url http://127.0.0.1:8000/v1 --model smollm2 --text text

takes any OpenAI-compatible endpoint. Prints what each step counted, the rank correlation of the
small scorer with the model, and the first thing kept; writes them under "served" of the result
file. A second run asks nothing again.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from experiments.bench.results import cpu_name, merge_result
from glm45_jax.data.agents import trajectories
from glm45_jax.data.endpoint import Decoding, Endpoint
from glm45_jax.data.local import sources
from glm45_jax.data.maths import Rubric, Taught, as_text
from glm45_jax.data.sources import Source, counted
from glm45_jax.data.synthetic import Family, GymCheck, GymProblems, Reasoned
from glm45_jax.data.tables import Tables
from glm45_jax.data.tools import Functions

SIZES = (("min_terms", 2), ("max_terms", 2), ("max_digits", 1))
# For small models: the rubric of data/maths.py is longer than what they follow.
ASK = """{text}

How much does the text above teach mathematics or science? Answer with a number from 0 (nothing) \
to 10 (very much), on one line: Score: and the number."""
SHOP = Tables(
    "CREATE TABLE stock (item TEXT PRIMARY KEY, price REAL, n INTEGER);"
    "INSERT INTO stock VALUES ('pen', 1.5, 30), ('ink', 7.25, 4), ('paper', 3.0, 120);",
    "The stock of a shop: what a piece costs and how many there are.",
)


def main() -> None:
    """Asks, counts, writes."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--url", required=True)
    p.add_argument("--model", required=True)
    p.add_argument("--text", required=True, help="the folder of glm45_jax.data.local")
    p.add_argument("--answers", default="answers", help="folder of what the model said")
    p.add_argument("--at-once", type=int, default=8, help="requests that are out together")
    p.add_argument("--docs", type=int, default=60, help="that the model scores (D14)")
    p.add_argument("--problems", type=int, default=24, help="of each family (D18)")
    p.add_argument("--requests", type=int, default=4, help="for tasks of each box (D20)")
    p.add_argument("--samples", type=int, default=4, help="of each problem and task (D18, D20)")
    args = p.parse_args()
    endpoint = Endpoint(args.url, args.model, at_once=args.at_once)
    folder = Path(args.answers)
    found: dict[str, Any] = {"model": args.model}

    prose = next(source for source in sources(args.text) if source.name == "prose")
    rubric = Rubric(ASK, max_chars=600, decoding=Decoding(temperature=0.0, max_tokens=24))
    taught = Taught(
        (prose,), endpoint, str(folder / "d14"), rubric, max_docs=args.docs, held_out=0.3
    )
    found["d14"] = _timed(lambda: as_text(taught.lesson().report))
    print("D14", found["d14"], flush=True)

    short = Decoding(temperature=0.7, top_p=0.95, max_tokens=128)
    families = tuple(
        Family(name, args.problems, SIZES) for name in ("basic_arithmetic", "chain_sum")
    )
    reasoned = Reasoned(
        GymProblems(families), GymCheck(), endpoint, str(folder / "d18"),
        samples=args.samples, decoding=short,
    )  # fmt: skip
    found["d18"] = _timed(partial(_counts, reasoned))
    print("D18", json.dumps(found["d18"], indent=1), flush=True)

    for name, box in (("d20_functions", Functions()), ("d20_tables", SHOP)):
        agents = trajectories(
            box,
            endpoint,
            str(folder / name),
            requests=args.requests,
            samples=args.samples,
            decoding=short,
        )
        found[name] = _timed(partial(_counts, agents))
        print("D20", json.dumps(found[name], indent=1), flush=True)
    print(merge_result(cpu_name(), "served", found))


def _timed(ask: Callable[[], Any]) -> dict[str, Any]:
    began = time.monotonic()
    try:
        found = ask()
    except ValueError as error:  # a model without scores, say: a finding
        found = f"ValueError: {error}"
    return {"found": found, "seconds": round(time.monotonic() - began, 1)}


def _counts(source: Source) -> dict[str, Any]:
    counts: dict[str, int] = {}
    kept = list(counted(source, counts))
    first = kept[0].text[:400] if kept else None
    return {"kept": len(kept), "counts": counts, "first": first}


if __name__ == "__main__":
    main()
