"""Sampling: greedy is the model's own argmax, rows do not matter to each other, temperature draws
from the softmax.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax import params as params_lib
from glm45_jax.model import config, transformer
from glm45_jax.rollout.sampling import generate, sample_token

LATENT = config.Mla(heads=3, q_rank=20, kv_rank=14, nope_dim=12, rope_dim=6, v_dim=10)


@pytest.fixture(scope="module", params=[config.tiny().mixer, LATENT], ids=("gqa", "mla"))
def tiny(request):
    cfg = dataclasses.replace(config.tiny(), mixer=request.param)
    params = params_lib.init(transformer.specs(cfg), jax.random.key(0))
    return cfg, jax.tree.map(lambda w: w * 4 if w.ndim > 2 else w, params)


def test_greedy_continuations_are_the_argmax_of_the_forward_pass_whatever_the_other_rows(tiny):
    cfg, params = tiny
    prompts = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6]]
    out = generate(params, prompts, cfg=cfg, max_tokens=4, key=jax.random.key(0))
    for prompt, continuation in zip(prompts, out, strict=True):
        tokens = jnp.asarray([prompt + continuation])
        logits = transformer.logits(params, transformer.forward(params, tokens, cfg=cfg), cfg=cfg)[
            0
        ]
        best = np.asarray(logits.argmax(axis=-1))[len(prompt) - 1 : -1]
        assert continuation == best.tolist()


def test_a_stop_id_ends_a_row_and_is_kept(tiny):
    cfg, params = tiny
    free = generate(params, [[5, 6, 7]], cfg=cfg, max_tokens=4, key=jax.random.key(0))[0]
    cut = generate(
        params, [[5, 6, 7]], cfg=cfg, max_tokens=4, stop=(free[1],), key=jax.random.key(0)
    )[0]
    assert cut == free[: free.index(free[1]) + 1]


def test_draws_follow_the_softmax_at_the_temperature():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.2]))
    draws = np.asarray(sample_token(jnp.tile(logits[None], (20_000, 1)), jax.random.key(0), 2.0))
    share = np.bincount(draws, minlength=3) / len(draws)
    expected = np.sqrt([0.5, 0.3, 0.2]) / np.sqrt([0.5, 0.3, 0.2]).sum()
    np.testing.assert_allclose(share, expected, atol=0.015)  # four standard errors of 20,000 draws


def test_an_empty_prompt_is_refused(tiny):
    cfg, params = tiny
    with pytest.raises(ValueError, match="the shortest of 0 tokens"):
        generate(params, [[1], []], cfg=cfg, max_tokens=1, key=jax.random.key(0))
