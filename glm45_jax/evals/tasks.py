"""seqio tasks as evaluations: their metrics on what a model says and on what it finds likely.

Any `seqio.Task` with "inputs" and "targets" over our vocabulary: `data.tasks.pair_task` makes one.
"""

from __future__ import annotations

import dataclasses
import inspect
from itertools import islice
from typing import Any

from glm45_jax.data.metrics import metric_values
from glm45_jax.data.tasks import read_pairs
from glm45_jax.evals.likelihood import target_scores
from glm45_jax.model.config import ModelConfig
from glm45_jax.model.transformer import Params
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0.0, max_tokens=256)


def evaluate_seqio(
    task: Any,
    driver: Driver,
    params: Params,
    tokenizer: Tokenizer,
    *,
    cfg: ModelConfig,
    split: str = "test",
    limit: int | None = None,
    sampling: Sampling = GREEDY,
) -> dict[str, float]:
    """What the task's `metric_fns` say of a model. driver: serves it. params: its weights.

    "predictions" are what it writes after the inputs, up to a stop token, by the task's
    postprocessor; "scores" are log p(targets | inputs); each is made where a metric asks for it.
    limit: the first examples only.

    Raises: ValueError for a split without examples, a task without metrics or over another
    vocabulary.
    """
    wanted = {name for fn in task.metric_fns for name in inspect.signature(fn).parameters}
    if not wanted:
        raise ValueError(f"{task.name} has no metric_fns; give it some, say [exact_match]")
    if split not in task.splits:
        raise ValueError(f"{task.name} has no split {split!r}; it has {list(task.splits)}")
    pairs = list(islice(read_pairs(task, split, tokenizer), limit))
    if not pairs:
        raise ValueError(f"{task.name}: split {split!r} has 0 examples; a score needs 1")
    outputs: dict[str, list[Any]] = {}
    if "predictions" in wanted:
        said = _answers(driver, tokenizer, [list(pair.inputs) for pair in pairs], sampling)
        outputs["predictions"] = [
            task.postprocess_fn(text, example=pair.example, is_target=False)
            for text, pair in zip(said, pairs, strict=True)
        ]
    if "scores" in wanted:
        ids = [(pair.inputs, pair.targets) for pair in pairs]
        outputs["scores"] = target_scores(params, ids, cfg=cfg)
    return metric_values(task.metric_fns, [pair.target for pair in pairs], **outputs)


def _answers(
    driver: Driver, tokenizer: Tokenizer, prompts: list[list[int]], sampling: Sampling
) -> list[str]:
    """Raises: RuntimeError where the engine fails one."""
    stop = tokenizer.stop_ids
    asked = dataclasses.replace(sampling, stop=stop)
    requests = [driver.submit(prompt, asked) for prompt in prompts]
    driver.run()
    texts = []
    for request in requests:
        done = request.completion
        assert done is not None
        if done.finish not in ("stop", "length"):
            raise RuntimeError(f"a request ended as {done.finish}: {done.error}")
        inside = [i for i in done.tokens_T.tolist() if i not in stop and i < tokenizer.vocab]
        texts.append(tokenizer.decode(inside))
    return texts
