"""Scores of what a model says: the same episodes as in RL, every one of them kept on disk.

The type to know is `Outcome`. Letters: `C` tasks, `J` samples of a task.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm45_jax.evals.types import EvalTask, Score, mean
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.episode import SEED_STRIDE, Episode, Episodes, Format
from glm45_jax.rollout.sampling import SEEDS
from glm45_jax.values import fingerprint

log = logging.getLogger(__name__)

AHEAD = 2  # episodes under way for each slot: while one waits for its judge, another decodes
Key = tuple[int, int]  # number of the task, sample


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of an `EvalTask`.

    score: by its `reduce`. parts: means of the parts of the reward. cut: share of the samples that
    ran out of tokens. errors: samples that the engine or the environment failed, which count as 0.
    tokens: that the model wrote. file: all episodes, JSON lines.
    """

    name: str
    score: Score
    parts: Mapping[str, Score]
    cut: float
    errors: int
    tokens: int
    file: Path


def evaluate(
    task: EvalTask,
    driver: Driver,
    format: Format,
    *,
    out: Path,
    model: str,
    seed: int = 0,
    progress: bool = True,
) -> Outcome:
    """The score of the model that the driver serves; `out`/ENV.jsonl holds every episode.

    What the file has is not asked again, so an evaluation that was killed goes on; the score is the
    same. model: says which weights these are, say "run/step 400". Draws hang on seed, task and
    sample alone.

    Raises: ValueError for a file that another model, seed or sampling wrote; RuntimeError where
    every sample failed.
    """
    from tqdm import tqdm

    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{task.env.name}.jsonl"
    head = {
        "env": task.env.name,
        "model": model,
        "seed": seed,
        "sampling": dataclasses.asdict(task.sampling),
        "thinking": format.thinking,
        "family": format.family,
        "tokenizer": format.tokenizer.fingerprint,
    }
    done = _read(file, head)
    wanted = [(n, j) for n in task.split for j in range(task.samples)]
    left = [key for key in wanted if key not in done][::-1]
    episodes = Episodes(driver, format)
    bar = tqdm(
        total=len(wanted),
        initial=len(wanted) - len(left),
        desc=task.env.name,
        unit="sample",
        disable=None if progress else True,
    )
    with bar, open(file, "a", encoding="utf-8") as lines:
        while left or episodes.running:
            while left and episodes.running < AHEAD * driver.engine.slots:
                number, sample = key = left.pop()
                draw = int(fingerprint((seed, number, sample))[:8], 16) * SEED_STRIDE % SEEDS
                sampling = dataclasses.replace(task.sampling, seed=draw)
                episodes.start(key, task.env, task.env.tasks(number), sampling)
            for ended, episode in episodes.tick():
                line = _line(ended, episode)
                done[line["number"], line["sample"]] = line
                lines.write(json.dumps(line, allow_nan=False) + "\n")
                bar.update()
            lines.flush()
    return _outcome(task, [done[key] for key in wanted], file)


def _line(key: Any, episode: Episode) -> dict[str, Any]:
    verdict = episode.verdict
    return {
        "number": key[0],
        "sample": key[1],
        "task": episode.task_id,
        "status": episode.status,
        "reward": verdict.reward if verdict else 0.0,
        "parts": dict(verdict.parts) if verdict else {},
        "error": episode.error,
        "messages": list(episode.messages),
        "tokens": episode.tokens_T.tolist(),
        "sampled": episode.sampled_T.astype(int).tolist(),
        "logp": [round(float(logp), 6) for logp in episode.logp_T],
        "versions": episode.versions_T.tolist(),
    }


def _read(file: Path, head: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """The episodes of a file that this evaluation began; a new file with its head otherwise.

    A last line that broke off is cut away, and asked again.
    """
    head = json.loads(json.dumps(head))
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if not whole:
        file.write_text(json.dumps(head) + "\n", encoding="utf-8")
        return {}
    first, *rest = whole.splitlines()
    if (found := json.loads(first)) != head:
        other = [key for key in head if found.get(key) != head[key]]
        raise ValueError(
            f"{file} holds another evaluation: {other} are {[found.get(key) for key in other]} "
            f"there and {[head[key] for key in other]} here; give another folder or remove it"
        )
    if len(whole) < len(text):
        log.warning("%s: its last line broke off, that sample is asked again", file)
        os.truncate(file, len(whole.encode()))
    lines = [json.loads(line) for line in rest]
    return {(line["number"], line["sample"]): line for line in lines}


def _outcome(task: EvalTask, lines: list[dict[str, Any]], file: Path) -> Outcome:
    shape = len(task.split), task.samples

    def of_samples(values: list[float]) -> np.ndarray:
        return np.array(values, np.float64).reshape(shape)

    parts = {
        part.name: Score.of(mean(of_samples([line["parts"].get(part.name, 0.0) for line in lines])))
        for part in task.env.rewards
    }
    status = [line["status"] for line in lines]
    errors = sum(s in ("error", "aborted") for s in status)
    if errors == len(lines):
        first = lines[0]["error"] or lines[0]["status"]
        raise RuntimeError(
            f"{task.env.name}: all {errors} samples failed, the first with {first}; nothing was "
            f"measured. Remove {file} and ask again when that is mended"
        )
    if errors:
        log.warning("%s: %d of %d samples failed", task.env.name, errors, len(lines))
    return Outcome(
        name=task.env.name,
        score=Score.of(task.reduce(of_samples([line["reward"] for line in lines]))),
        parts=parts,
        cut=status.count("length") / len(lines),
        errors=errors,
        tokens=sum(sum(line["sampled"]) for line in lines),
        file=file,
    )
