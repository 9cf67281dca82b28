"""The policy update: the same on any devices, nothing learned from what the policy did not write,
the engine's log-probs recomputed, its experts replayed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from glm45_jax import params as params_lib
from glm45_jax.kernels import cross_entropy
from glm45_jax.model import config, mtp, transformer
from glm45_jax.optim.mixed import AdamW
from glm45_jax.optim.muon import Muon
from glm45_jax.optim.schedules import Constant
from glm45_jax.rl.batch import pack
from glm45_jax.rl.correction import Tis
from glm45_jax.rl.loss import SequenceMean
from glm45_jax.rl.objective import K3, Clip
from glm45_jax.rl.trajectory import Trajectory
from glm45_jax.rl.update import (
    PolicyWork,
    Update,
    count_all,
    loss,
    loss_of_hidden,
    make_updater,
    trunk,
)
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.engine import GlmEngine
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.sharding import MeshShape
from glm45_jax.train.parallel import Pmap
from tests.bits import UNFUSED
from tests.rl.common import trajectories

T, ROWS = 24, 16
CFG = dataclasses.replace(config.tiny(), n_dense=0, impl=config.Impl(grouped_matmul="reference"))
MUON = Muon(lr=3e-3, schedule=Constant(1.0), dtype="float32")
ADAMW = AdamW(lr=3e-3, schedule=Constant(1.0))
EVERYTHING = Update(
    objective=Clip(dual=3.0),
    corrections=(Tis(),),
    kl=K3(0.1),
    reduction=SequenceMean(),
    mtp_weight=0.2,
    replay=True,
)
NO_MTP = dataclasses.replace(EVERYTHING, mtp_weight=None)
WAYS = {
    "one": (MeshShape(1, 1), None),
    "pmap": (Pmap(), None),
    "mesh": (MeshShape(1, fsdp=2, expert=2, tensor=2), None),
    "pmap and micro-batches": (Pmap(), 8),
    "rows over devices": (MeshShape(1, fsdp=2, context=2, tensor=2), None),
}


@functools.cache
def weights(seed=0, cfg=CFG):
    """Weights large enough for logits that differ."""
    params = params_lib.init(transformer.specs(cfg), jax.random.key(seed))
    return jax.tree.map(lambda w: w * 4 if w.ndim > 2 else w, params)


def random_rows(seed=0, rows=ROWS):
    """Packed rows of random trajectories with routes, old and reference log-probs, temperatures."""
    rng = np.random.default_rng(seed)
    some = trajectories(rng, rng.integers(2, 12, 24))
    shape = (CFG.n_moe, CFG.moe.experts)
    routed = []
    for one in some:
        routes_TLA = rng.random((len(one.tokens_T), *shape)).argsort(axis=-1)[..., :3]
        routes_TLA[-1] = -1
        routed.append(dataclasses.replace(one, routes_TLA=routes_TLA.astype(np.int16)))
    advantage_N = rng.normal(size=len(some)).astype(np.float32)
    temperature_N = rng.choice([0.7, 1.0, 1.3], len(some))
    batch = pack(
        routed, advantage_N, seq_len=T, pad_id=0, multiple=rows, temperature_N=temperature_N
    )
    assert batch.weight_BT.shape == (rows, T)
    near_BT = rng.normal(size=batch.logp_BT.shape).astype(np.float32) * 0.1
    logp_BT = np.where(batch.weight_BT > 0, near_BT - 5.5, 0)
    return batch.replace(
        logp_BT=logp_BT,
        old_logp_BT=logp_BT + near_BT[::-1] * (batch.weight_BT > 0),
        reference_logp_BT=logp_BT - near_BT * (batch.weight_BT > 0),
    )


@functools.cache
def updater(way="one", update=EVERYTHING, optim=MUON, cfg=CFG):
    where, micro_rows = WAYS[way]
    devices = jax.devices()[:1] if where == MeshShape(1, 1) else None
    update = dataclasses.replace(update, micro_rows=micro_rows)
    return make_updater(cfg, optim, update, where=where, devices=devices)


@functools.cache
def after_two_steps(way, optim=MUON):
    run = updater(way, optim=optim)
    state = run.init(weights())
    logp_BT = run.logp(state.params, random_rows(2))
    outs = []
    for seed in range(2):
        state, out = run.step(state, random_rows(seed))
        outs.append(jax.device_get(out))
    return jax.device_get(run.trainer.save_view(state)), outs, logp_BT


@pytest.mark.parametrize(
    "way,optim",
    [
        ("mesh", MUON),
        ("pmap and micro-batches", ADAMW),
        pytest.param("rows over devices", MUON, marks=pytest.mark.slow),
    ],
)
def test_pmap_mesh_one_device_and_micro_batches_take_the_same_steps(way, optim):
    state, outs, logp_BT = after_two_steps(way, optim)
    alone, alone_outs, alone_logp_BT = after_two_steps("one", optim)
    np.testing.assert_allclose(logp_BT, alone_logp_BT, atol=1e-5)
    for out, expected in zip(outs, alone_outs, strict=True):
        assert bool(out.ok)
        np.testing.assert_array_equal(out.load_LE, expected.load_LE)
        assert out.scalars.keys() == expected.scalars.keys()
        for name in expected.scalars:
            np.testing.assert_allclose(
                out.scalars[name], expected.scalars[name], rtol=1e-4, atol=1e-6, err_msg=name
            )
    for ours, theirs in zip(jax.tree.leaves(state.opt), jax.tree.leaves(alone.opt), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True)
    # Adam divides a tiny gradient by its own size: rounding shows at 1% of two steps of 3e-3.
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, atol=6e-5)


def test_the_step_moves_every_weight_but_the_router_biases_and_copies_what_it_was_given():
    before = jax.tree.map(np.asarray, weights())
    state, outs, _ = after_two_steps("one")
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, weights()), before)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, before)
    still = {
        params_lib.path_name(path)
        for path, is_moved in jax.tree_util.tree_leaves_with_path(moved)
        if not is_moved
    }
    assert still == {"moe.ffn.bias_E", "mtp.block.ffn.bias_E"}
    assert state.step == 2 and state.tokens_seen.tolist() == [0, 2 * ROWS * T]
    assert {"loss/policy", "loss/kl", "loss/mtp", "policy/rollout_kl"} <= set(outs[0].scalars)


@functools.cache
def gradient(update, inside=False):
    """Jitted gradient of the loss in the weights, or in the trunk's hidden states."""

    def of_weights(params, batch):
        out = loss(params, batch, count_all(batch), cfg=CFG, update=update)
        return out.loss, out

    def of_hidden(hidden_BTD, batch):
        counts = count_all(batch)
        return loss_of_hidden(weights(), hidden_BTD, batch, counts, cfg=CFG, update=update).loss

    found = jax.grad(of_hidden) if inside else jax.grad(of_weights, has_aux=True)
    return jax.jit(found, compiler_options=UNFUSED)


def test_the_gradient_is_exactly_zero_where_the_policy_did_not_write():
    batch = random_rows()
    hidden = trunk(weights(), batch, cfg=CFG, replay=True)
    grad_BTD = np.asarray(gradient(EVERYTHING, inside=True)(hidden.hidden_BTD, batch))
    wrote_BT = batch.weight_BT > 0
    assert np.isfinite(grad_BTD).all()
    assert (grad_BTD[~wrote_BT] == 0).all()
    assert (np.abs(grad_BTD[wrote_BT]).max(axis=1) > 0).mean() > 0.9  # a clip may take some


def test_what_stands_where_the_policy_did_not_write_changes_neither_loss_nor_gradient():
    batch, rng = random_rows(), np.random.default_rng(5)
    wrote_BT = batch.weight_BT > 0
    noise_BT = np.where(wrote_BT, 0, rng.normal(size=wrote_BT.shape) * 50).astype(np.float32)
    other = batch.replace(
        batch=batch.batch.replace(targets_BT=np.where(wrote_BT, batch.batch.targets_BT, 9)),
        **{
            name: getattr(batch, name) + noise_BT
            for name in ("logp_BT", "old_logp_BT", "reference_logp_BT", "advantage_BT")
        },
    )
    ours, theirs = (gradient(EVERYTHING)(weights(), rows) for rows in (batch, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), ours, theirs)


def test_embeddings_of_tokens_after_the_last_one_drawn_learn_nothing():
    one = Trajectory(
        task_id="t",
        group="g",
        tokens_T=np.array([1, 2, 3, 4, 5], np.int32),
        sampled_T=np.array([False, False, True, False, False]),
        logp_T=np.full(5, -5.5, np.float32),
        versions_T=np.zeros(5, np.int32),
        reward=1.0,
        routes_TLA=np.full((5, CFG.n_moe, CFG.moe.top_k), -1, np.int16),
    )
    some = np.ones(1, np.float32)
    batch = pack([one], some, seq_len=T, pad_id=0, multiple=ROWS, temperature_N=some)
    batch = batch.replace(old_logp_BT=batch.logp_BT, reference_logp_BT=batch.logp_BT)
    grads, _ = gradient(NO_MTP)(weights(), batch)
    size_V = np.abs(np.asarray(grads.embed_VD)).max(axis=1)
    assert (size_V[1:3] > 1e-6).all()  # what was read before it was drawn
    assert (np.delete(size_V, [1, 2]) == 0).all()  # the drawn token itself, and what followed


def test_mtp_learns_from_drawn_tokens_and_touches_no_other_weight():
    batch = random_rows()
    plain, _ = gradient(NO_MTP)(weights(), batch)
    both, out = gradient(EVERYTHING)(weights(), batch)
    for name in ("embed_VD", "moe", "norm_D", "head_DV"):
        jax.tree.map(np.testing.assert_array_equal, getattr(both, name), getattr(plain, name))
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(plain.mtp)) == 0
    assert float(jnp.abs(both.mtp.join_2DD).max()) > 0
    rows = batch.batch
    hidden = trunk(weights(), batch, cfg=CFG, replay=True)
    where = dict(positions_BT=rows.positions_BT, segments_BT=rows.segments_BT)
    ahead_BTD = mtp.forward(weights(), hidden.hidden_BTD, rows.tokens_BT, cfg=CFG, **where)
    logp_BTV = jax.nn.log_softmax(transformer.logits(weights(), ahead_BTD, cfg=CFG))
    nll = [
        -logp_BTV[b, t, rows.targets_BT[b, t + 1]]
        for b, t in np.argwhere(batch.weight_BT[:, 1:] > 0)
        if rows.segments_BT[b, t] == rows.segments_BT[b, t + 1]
    ]
    assert len(nll) > 50
    np.testing.assert_allclose(out.parts["mtp"], np.mean(nll), rtol=1e-5)


def sampled(cfg, params, n=6, **options):
    """Trajectories of the real engine, and the temperature of each."""
    engine = GlmEngine(
        cfg, slots=4, pages=32, page=4, max_tokens=T, buckets=(8,), spans=(6,), **options
    )
    driver, rng = Driver(engine, params), np.random.default_rng(3)
    temperature_N = np.array([0.7, 1.0, 1.6])[np.arange(n) % 3]
    requests = [
        driver.submit(
            rng.integers(0, 256, rng.integers(2, 9)).tolist(),
            Sampling(temperature=temperature, max_tokens=9, seed=i),
        )
        for i, temperature in enumerate(temperature_N.tolist())
    ]
    driver.run()
    return [_trajectory(i, request) for i, request in enumerate(requests)], temperature_N


def _trajectory(i, request):
    done, before = request.completion, len(request.prompt)
    tokens_T = np.concatenate([np.array(request.prompt, np.int32), done.tokens_T])
    routes_TLA = done.routes_TLA
    if routes_TLA is not None:
        routes_TLA = np.concatenate(
            [routes_TLA.astype(np.int16), -np.ones_like(routes_TLA[:1], np.int16)]
        )
    return Trajectory(
        task_id=f"t{i}",
        group=f"g{i // 2}",
        tokens_T=tokens_T,
        sampled_T=np.arange(len(tokens_T)) >= before,
        logp_T=np.concatenate([np.zeros(before, np.float32), done.logp_T]),
        versions_T=np.zeros(len(tokens_T), np.int32),
        reward=float(i % 2),
        routes_TLA=routes_TLA,
    )


@functools.cache
def rollouts():
    drawn, temperature_N = sampled(CFG, weights(), routes=True)
    advantage_N = np.array([one.reward - 0.5 for one in drawn], np.float32)
    return pack(drawn, advantage_N, seq_len=T, pad_id=0, multiple=8, temperature_N=temperature_N)


def test_the_first_step_on_what_the_engine_drew_has_no_kl_and_nothing_to_clip():
    batch, run = rollouts(), updater("pmap", update=Update(corrections=(Tis(),)))
    state = run.init(weights())
    logp_BT = run.logp(state.params, batch)
    assert (batch.weight_BT > 0).sum() == 6 * 9
    np.testing.assert_allclose(logp_BT, batch.logp_BT, rtol=0, atol=1e-5)
    state, out = run.step(state, batch.replace(old_logp_BT=logp_BT))
    scalars = {name: float(x) for name, x in out.scalars.items()}
    assert scalars["policy/rollout_gap"] < 1e-5
    for name in ("rollout_kl", "mismatch_kl", "drift_kl"):
        assert 0 <= scalars[f"policy/{name}"] < 1e-9
    assert scalars["policy/clip_fraction"] == scalars["policy/dropped"] == 0
    assert scalars["grad_norm"] > 0
    after_BT = run.logp(state.params, batch)
    up = ((after_BT - logp_BT) * batch.advantage_BT).sum()
    assert up > 1e-2  # likelier where the advantage is positive, less likely where negative
    _, again = run.step(state, batch.replace(old_logp_BT=logp_BT))
    assert float(again.scalars["policy/drift_kl"]) > 1e-6


@pytest.mark.parametrize(
    "way",
    [
        "one",
        pytest.param("pmap and micro-batches", marks=pytest.mark.slow),
        pytest.param("mesh", marks=pytest.mark.slow),
    ],
)
def test_the_first_step_on_a_batch_is_the_same_without_scores_made_before(way):
    batch, run = random_rows(), updater(way, optim=ADAMW)
    fresh_B = np.arange(ROWS) % 2 == 0
    state = run.init(weights())
    scored = batch.replace(old_logp_BT=run.logp(state.params, batch))
    after, expected = run.step(state, scored)
    alone, out = run.step(run.init(weights()), batch.replace(old_logp_BT=None, fresh_B=fresh_B))
    for name, value in expected.scalars.items():
        np.testing.assert_allclose(out.scalars[name], value, rtol=1e-3, atol=1e-6, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        *(jax.device_get(run.params(one)) for one in (after, alone)),
    )
    counted_BT = (batch.weight_BT > 0) & fresh_B[:, None]
    gap_M = (scored.old_logp_BT - batch.logp_BT)[counted_BT]
    for name, values in (("gap", abs(gap_M)), ("kl", np.expm1(gap_M) - gap_M)):
        assert float(out.scalars[f"policy/fresh_{name}"]) == pytest.approx(values.mean(), rel=1e-3)


def test_a_step_on_fresh_rows_that_the_engine_scored_otherwise_is_not_taken():
    run = make_updater(CFG, ADAMW, Update(), where=Pmap(1), most_mismatch=1e-2)
    batch, fresh_B = rollouts().replace(routes_BTLA=None), rollouts().version_B == 0
    wrong = batch.replace(logp_BT=batch.logp_BT - 0.3 * (batch.weight_BT > 0))
    state, out = run.step(run.init(weights()), wrong.replace(fresh_B=fresh_B))
    assert not bool(out.ok) and float(out.scalars["policy/fresh_gap"]) > 0.29
    assert np.isfinite(float(out.scalars["loss"]))
    same = jax.device_get(run.params(run.init(weights())))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.params(state)), same)
    for taken in (batch.replace(fresh_B=fresh_B), wrong.replace(fresh_B=~fresh_B & False)):
        state, out = run.step(state, taken)
        assert bool(out.ok)


def test_the_engines_experts_replayed_give_its_log_probs_by_a_router_that_would_choose_others():
    # The bias steers the choice and is in no gate: with the experts given, nothing else differs.
    bias_LE = 2 * jax.random.normal(jax.random.key(9), weights().moe.ffn.bias_E.shape)
    moe = weights().moe
    steered = weights().replace(moe=moe.replace(ffn=moe.ffn.replace(bias_E=bias_LE)))
    free, replayed = (updater(update=Update(replay=replay)) for replay in (False, True))
    batch = rollouts()
    np.testing.assert_allclose(
        replayed.logp(replayed.place(steered), batch), batch.logp_BT, rtol=0, atol=1e-5
    )
    assert np.abs(free.logp(free.place(steered), batch) - batch.logp_BT).max() > 0.1
    _, out = replayed.step(replayed.init(steered), batch)
    assert float(out.scalars["policy/rollout_gap"]) < 1e-5


def test_weights_go_in_and_come_out_as_they_are():
    for way in ("one", "pmap", "mesh"):
        run = updater(way)
        for params in (
            run.params(run.init(weights())),
            run.trainer.save_view(run.init(weights())).params,
        ):
            jax.tree.map(np.testing.assert_array_equal, params, weights())


def all_arrays(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval for v in eqn.outvars)
        for inner in jaxprs_in_params(eqn.params):
            yield from all_arrays(inner)


def test_all_logits_never_exist_in_a_step_nor_in_log_probs(monkeypatch):
    cfg = dataclasses.replace(CFG, vocab=8192)
    for name in ("CHUNK_ELEMENTS", "FUSED_ELEMENTS"):
        monkeypatch.setattr(cross_entropy, name, 512)
    work, batch = PolicyWork(cfg, ADAMW, EVERYTHING), random_rows()
    run = updater(cfg=cfg)
    state = jax.eval_shape(run.trainer.init, jax.random.key(0))
    largest_weight = max(x.size for x in jax.tree.leaves(state.params))
    opt = jax.eval_shape(work.tx.init, state.params)
    for f in (
        lambda s: work.step(s, batch, accum=1),
        lambda s: work.logp(s.params, batch, accum=1),
    ):
        jaxpr = jax.make_jaxpr(f)(state.replace(opt=opt)).jaxpr
        biggest = max(int(np.prod(a.shape)) for a in all_arrays(jaxpr) if hasattr(a, "shape"))
        least = max(largest_weight, 128 * cfg.vocab)  # a chunk of tokens has no fewer
        assert biggest <= least < ROWS * T * cfg.vocab


def test_what_does_not_fit_is_refused_with_the_way_out():
    batch, run = random_rows(), updater("pmap")
    state = run.init(weights())
    with pytest.raises(ValueError, match="batch has none; use GlmEngine"):
        run.step(state, batch.replace(routes_BTLA=None))
    with pytest.raises(ValueError, match=r"\(16, 24, 1, 3\), the rows .* want \(16, 24, 2, 3\)"):
        run.step(state, batch.replace(routes_BTLA=batch.routes_BTLA[:, :, :1]))
    with pytest.raises(ValueError, match="expert 8, the model has 8"):
        run.step(state, batch.replace(routes_BTLA=batch.routes_BTLA + np.int16(1)))
    twice_BTLA = batch.routes_BTLA.copy()
    twice_BTLA[3, 1, 0] = [4, 2, 4]
    with pytest.raises(ValueError, match=r"\(3, 1, 0\) was routed to \[4, 2, 4\]"):
        run.logp(state.params, batch.replace(routes_BTLA=twice_BTLA))
    with pytest.raises(ValueError, match="batch of 15 rows is not a multiple of 8"):
        run.step(state, jax.tree.map(lambda x: x[:15], batch))
    with pytest.raises(ValueError, match=r"micro_rows 12 do not divide over the 8 .* use 16"):
        make_updater(CFG, MUON, Update(micro_rows=12))
    assert updater("pmap").multiple == updater("pmap and micro-batches").multiple == 8
    with pytest.raises(ValueError, match="16 rows is not a multiple of micro_rows 5"):
        PolicyWork(CFG, MUON, Update(micro_rows=5)).accum(16)
    bare = dataclasses.replace(CFG, n_mtp=0)
    with pytest.raises(ValueError, match="no MTP layer"):
        make_updater(bare, MUON, Update(mtp_weight=0.2))
    with pytest.raises(ValueError, match="no MoE layers"):
        make_updater(dataclasses.replace(CFG, n_moe=0, n_dense=1), MUON, Update(replay=True))
    with pytest.raises(ValueError, match=r"drawn at temperature 0\.0"):
        one = trajectories(np.random.default_rng(0), [4])
        pack(one, np.ones(1), seq_len=8, pad_id=0, temperature_N=np.zeros(1))
    for wrong in (dict(mtp_weight=0.0), dict(micro_rows=0)):
        with pytest.raises(ValueError):
            Update(**wrong)
