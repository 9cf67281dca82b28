"""What the rollout tests share: two mixers, weights, and the trainer's view of an output."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from glm45_jax import params as params_lib
from glm45_jax.model import config, transformer
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.engine import chosen
from glm45_jax.rollout.sampling import Sampling

MIXERS = {
    "gqa": config.tiny().mixer,
    "mla": config.Mla(heads=3, q_rank=20, kv_rank=14, nope_dim=12, rope_dim=6, v_dim=10),
}
ROW = 32  # tokens of every reference forward: one compilation
CLOSE = dict(rtol=0, atol=1e-5)  # float32


def weights(cfg, seed):
    """Random weights, large enough for logits that differ."""
    params = params_lib.init(transformer.specs(cfg), jax.random.key(seed))
    return jax.tree.map(lambda w: w * 4 if w.ndim > 2 else w, params)


def random_prompts(seed, lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, n).tolist() for n in lengths]


@functools.partial(jax.jit, static_argnames="cfg")
def _forward(params, tokens_BT, cfg):
    hidden = transformer.forward(params, tokens_BT, cfg=cfg)
    return transformer.logits(params, hidden, cfg=cfg), chosen(params, hidden, cfg)


def forward(model, tokens):
    """Logits and experts of every token, from one forward pass."""
    cfg, params = model
    padded = jnp.asarray([tokens + [0] * (ROW - len(tokens))], jnp.int32)
    logits_BTV, routes_BTLA = _forward(params, padded, cfg)
    n = len(tokens)
    return np.asarray(logits_BTV)[0, :n], np.asarray(routes_BTLA)[0, :n]


def reference(model, prompt, out, temperature):
    """Log-probs of `out` at the temperature and at 1, experts of all tokens but the last."""
    logits_TV, routes_TLA = forward(model, [*prompt, *out])
    logits_TV = logits_TV[len(prompt) - 1 : -1]
    rows = np.arange(len(out)), np.asarray(out, int)
    raw_T = np.asarray(jax.nn.log_softmax(logits_TV))[rows]
    if temperature == 0:
        return 0 * raw_T, raw_T, routes_TLA[:-1]
    warm_T = np.asarray(jax.nn.log_softmax(logits_TV / np.float32(temperature)))[rows]
    return warm_T, raw_T, routes_TLA[:-1]


def check(model, request):
    """A completion against one forward pass over its tokens."""
    done, out = request.completion, request.completion.tokens_T.tolist()
    warm_T, raw_T, routes_TLA = reference(model, request.prompt, out, request.sampling.temperature)
    np.testing.assert_allclose(done.logp_T, warm_T, **CLOSE)
    np.testing.assert_allclose(done.logp_raw_T, raw_T, **CLOSE)
    np.testing.assert_array_equal(done.routes_TLA, routes_TLA)


def mixed(seed, n, least=1):
    """Requests of every length, temperature and truncation, of at least so many tokens."""
    rng = np.random.default_rng(seed)
    asks = [
        Sampling(
            temperature=(0.0, 0.6, 1.0, 1.7)[i % 4],
            top_p=(1.0, 0.8)[i % 2],
            top_k=(0, 20, 0)[i % 3],
            min_p=(0.0, 0.0, 0.02)[i % 3],
            max_tokens=int(rng.integers(least, 13)),
            seed=int(rng.integers(2**32)),
        )
        for i in range(n)
    ]
    return list(zip(random_prompts(seed, rng.integers(1, 20, n)), asks, strict=True))


def serve(engine, params, asked, *, together=True, **options):
    driver = Driver(engine, params, **options)
    requests = []
    for tokens, sampling in asked:
        requests.append(driver.submit(tokens, sampling))
        if not together:
            driver.run()
    driver.run()
    stats = driver.stats
    assert (stats.free_slots, stats.free_pages) == (engine.slots, engine.pages)
    return requests, stats
