"""Weights on their way: what arrives is what was sent, each policy keeps its word, and what fails
leaves the old version as if it had never been.
"""

import asyncio
import dataclasses
import functools
import gc
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_jax import params as params_lib
from glm45_jax.model import config, transformer
from glm45_jax.model.quantize import quantize
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.engine import GlmEngine
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.rollout.types import Policy
from glm45_jax.rollout.weights import Push, abort, checksum, prepare, publish, push, stage, update
from glm45_jax.sharding import MeshShape, Rules, make_mesh, shardings
from tests.rollout.common import CLOSE, ROW, random_prompts, reference, weights
from tests.rollout.integers import Tagged, check, idle

POLICIES = typing.get_args(Policy)
CFG = dataclasses.replace(config.tiny(), n_mtp=0)
ENGINE = GlmEngine(CFG, slots=3, pages=24, page=4, max_tokens=ROW, buckets=(8,))


@functools.cache
def trained(version, cfg=CFG):
    """Weights that a trainer has at a version."""
    return weights(cfg, version)


def begin(driver, ticks=3, most=8):
    """Requests of which some tokens are drawn."""
    asked = [Sampling(max_tokens=most + i, seed=i) for i in range(3)]
    prompts = random_prompts(4, [5, 9, 3])
    requests = [driver.submit(p, s) for p, s in zip(prompts, asked, strict=True)]
    for _ in range(ticks):
        driver.tick()
    return requests


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=30)
@given(rng=st.randoms(use_true_random=False))
def test_versions_never_fall_and_each_policy_keeps_its_word(policy, rng):
    engine, requests, version = Tagged(3, 16), [], 0
    driver = Driver(engine, 0, prefill_tokens=8)
    while len(requests) < 20 or driver.busy:
        if len(requests) < 20 and rng.random() < 0.5:
            tokens = [rng.randrange(9) for _ in range(rng.randint(1, 12))]
            requests.append(driver.submit(tokens, Sampling(max_tokens=rng.randint(1, 20))))
        if rng.random() < 0.2 and len(requests) < 20:
            version += rng.randint(1, 3)
            driver.push(version, version, policy=policy)
        had = {r: len(r.out) for r in requests}
        driver.tick()
        new = {v for r in requests for v in r.versions[had[r] :]}
        if policy == "drain":
            begun = [r.versions for r in requests if r.out and r.completion is None]
            assert {v for versions in begun for v in versions} <= {driver.stats.version}
        else:
            assert new <= {version} == {driver.stats.version}
        for row in driver._batch._running() if policy == "abort_and_resume" else ():
            wrote_S = driver._batch._state.by_PS[row.pages].reshape(-1)[: row.cached]
            assert set(wrote_S) == {version}
    assert idle(driver, engine) and driver.stats.version == version
    for request in requests:
        check(request, engine)
        assert policy != "drain" or len(set(request.completion.versions)) == 1


def test_a_drain_lets_nothing_new_begin_and_a_newer_push_takes_its_place():
    engine = Tagged(2, 20)
    driver = Driver(engine, 0)
    running = driver.submit([1], Sampling(max_tokens=6))
    driver.tick()
    driver.push(1, 1, policy="drain")
    waiting = driver.submit([2], Sampling(max_tokens=3))
    driver.flush()  # what has begun waits, and still ends by the old weights
    driver.tick()
    assert (len(running.out), waiting.out, driver.stats.version) == (4, [], 0)
    driver.push(2, 2)
    driver.tick()
    assert running.versions == [0, 0, 0, 0, 2] and waiting.versions == [2, 2]
    driver.push(3, 3, policy="drain")
    for request in (running, waiting):
        driver.cancel(request)
    assert driver.busy and not driver.tick()  # nobody is left to wait for
    assert (driver.stats.version, driver.stats.pushes) == (3, 2) and idle(driver, engine)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_token_has_the_log_prob_that_the_weights_of_its_version_give_it(policy):
    driver = Driver(ENGINE, trained(0))
    requests = begin(driver)
    push(driver, trained(1), 1, cfg=CFG, how=Push(policy))
    requests += begin(driver, 0)
    driver.run()
    assert driver.stats.version == 1
    for request in requests:
        done, truth = request.completion, []
        for version in done.versions:
            model = (CFG, trained(version))
            truth.append(reference(model, request.prompt, request.out, 1.0)[0][len(truth)])
        crossed = len(set(done.versions)) == 2
        assert crossed == (request in requests[:3] and policy != "drain")
        # Over old keys and values the new weights are not those of any forward pass.
        equal = np.allclose(done.logp_T, truth, **CLOSE)
        assert equal == (not crossed or policy == "abort_and_resume")


@pytest.mark.parametrize("reached", ("prepared", "staged", "damaged", "not finite"))
def test_a_push_that_is_aborted_leaves_the_old_version_as_if_it_had_never_been(reached):
    answers = []
    for disturbed in (False, True):
        driver = Driver(ENGINE, trained(0))
        requests = begin(driver)
        if disturbed and reached == "damaged":
            with pytest.raises(RuntimeError):
                stage(prepare(trained(1), 1, cfg=CFG), put=damaged)
        elif disturbed and reached == "not finite":
            broken = trained(1).replace(norm_D=trained(1).norm_D.at[3].set(jnp.nan))
            with pytest.raises(ValueError):
                push(driver, broken, 1, cfg=CFG)
        elif disturbed:
            parcel = prepare(trained(1), 1, cfg=CFG)
            if reached == "staged":
                parcel = stage(parcel, jax.devices()[0])
            driver.tick()
            abort(parcel)
            with pytest.raises(ValueError, match="handed on or aborted"):
                publish(driver, dataclasses.replace(parcel, staged=True))
        driver.run()
        assert driver.stats.version == driver.stats.pushes == 0
        answers.append([r.completion for r in requests])
    for quiet, disturbed in zip(*answers, strict=True):
        for name in ("tokens_T", "logp_T", "logp_raw_T", "versions"):
            np.testing.assert_array_equal(getattr(quiet, name), getattr(disturbed, name))
    push(driver, trained(1), 1, cfg=CFG)  # its number is free again
    assert driver.stats.version == 1


def damaged(leaf, target, at=7):
    """One bit of one leaf, the others as they are."""
    here = jax.device_put(leaf, target)
    if here.ndim != 4:
        return here
    words = np.array(here)
    words.reshape(-1).view(np.uint32)[at] ^= 1
    return jnp.asarray(words)


def test_what_did_not_arrive_as_it_was_sent_is_refused_and_named():
    def swapped(leaf, target):
        return jax.device_put(leaf, target)[::-1]

    def shorter(leaf, target):
        return jax.device_put(leaf[:1], target)

    def other(leaf, target):
        return jax.device_put(leaf.astype(jnp.bfloat16), target)

    for put, what in (
        (damaged, r"dense.mixer.q_DNH of version 4 came as float32\[1, 64, 6, 16\] with checksum"),
        (swapped, r"embed_VD of version 4 came as float32\[256, 64\] with checksum 0x"),
        (shorter, r"embed_VD of version 4 came as float32\[1, 64\] .* sent as float32\[256, 64\]"),
        (other, r"embed_VD of version 4 came as bfloat16\[256, 64\]"),
    ):
        with pytest.raises(RuntimeError, match=what):
            stage(prepare(trained(1), 4, cfg=CFG), put=put)


@pytest.mark.parametrize("fp8", (False, True), ids=("float32", "fp8"))
@pytest.mark.parametrize(
    "mesh", (MeshShape(data=2, fsdp=4), MeshShape(fsdp=2, expert=2, tensor=2)), ids=str
)
def test_from_a_mesh_of_eight_devices_the_same_bytes_arrive_on_one(mesh, fp8):
    one = jax.devices()[3]
    want = quantize(trained(1), CFG) if fp8 else trained(1)
    layout = shardings(transformer.specs(CFG), make_mesh(mesh), Rules())
    there = jax.device_put(trained(1), layout)
    parcel = stage(prepare(there, 1, cfg=CFG, fp8=fp8), one)
    assert jax.tree.structure(parcel.params) == jax.tree.structure(want)
    for leaf, same in zip(jax.tree.leaves(parcel.params), jax.tree.leaves(want), strict=True):
        assert leaf.devices() == {one} and leaf.dtype == same.dtype
        assert np.asarray(leaf).tobytes() == np.asarray(same).tobytes()


def test_onto_a_mesh_of_its_own_the_same_bytes_arrive():
    layout = shardings(transformer.specs(CFG), make_mesh(MeshShape(tensor=2, fsdp=4)), Rules())
    parcel = stage(prepare(trained(1), 1, cfg=CFG), layout)
    for leaf, same, where in zip(
        *map(jax.tree.leaves, (parcel.params, trained(1), layout)), strict=True
    ):
        assert leaf.sharding == where
        np.testing.assert_array_equal(leaf, same)


def test_a_trainer_may_give_its_weights_away_once_a_push_is_prepared():
    mine = jax.tree.map(jnp.copy, trained(1))
    parcel = prepare(mine, 1, cfg=CFG)
    jax.tree.map(lambda leaf: leaf.delete(), mine)
    parcel = stage(parcel, jax.devices()[0])
    for leaf, same in zip(*map(jax.tree.leaves, (parcel.params, trained(1))), strict=True):
        np.testing.assert_array_equal(leaf, same)


@pytest.mark.parametrize("fp8", (False, True), ids=("bfloat16", "fp8"))
def test_weights_in_the_engines_dtype_give_the_very_logits_of_the_trainers(fp8):
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    tokens_BT = jnp.asarray(random_prompts(1, [ROW]), jnp.int32)

    @jax.jit
    def logits(params):
        return transformer.logits(params, transformer.forward(params, tokens_BT, cfg=cfg), cfg=cfg)

    served = stage(prepare(trained(1), 1, cfg=cfg, fp8=fp8)).params
    kept = {params_lib.path_name(p): w for p, w in jax.tree_util.tree_leaves_with_path(served)}
    assert kept["embed_VD"].dtype == jnp.bfloat16
    assert kept["moe.ffn.router_DE"].dtype == kept["moe.ffn.bias_E"].dtype == jnp.float32
    theirs = jax.tree.map(lambda w: w.astype(jnp.bfloat16), trained(1))
    truth = quantize(theirs, cfg) if fp8 else trained(1)
    if fp8:  # the router is not rounded on its way
        ffn = truth.moe.ffn.replace(router_DE=trained(1).moe.ffn.router_DE)
        truth = truth.replace(moe=truth.moe.replace(ffn=ffn))
    np.testing.assert_array_equal(logits(served), logits(truth))


def test_rows_drawn_by_weights_that_came_as_fp8_have_the_log_probs_of_their_forward_pass():
    driver = Driver(ENGINE, trained(0))
    requests = begin(driver)
    push(driver, trained(1), 1, cfg=CFG, how=Push("abort_and_resume", fp8=True))
    driver.run()
    for request in requests:
        before = request.versions.index(1)
        model = (CFG, quantize(trained(1), CFG))
        truth_T = reference(model, request.prompt, request.out, 1.0)[0]
        np.testing.assert_allclose(request.completion.logp_T[before:], truth_T[before:], **CLOSE)
        exact_T = reference((CFG, trained(1)), request.prompt, request.out, 1.0)[0]
        assert not np.allclose(truth_T, exact_T, atol=1e-3)


def held():
    """Bytes of all arrays there are."""
    return sum(leaf.nbytes for leaf in jax.live_arrays())


def test_at_most_the_old_weights_and_the_new_ones_are_held():
    one = sum(leaf.nbytes for leaf in jax.tree.leaves(trained(0)))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(trained(0)))
    driver = Driver(ENGINE, stage(prepare(trained(0), 0, cfg=CFG)).params)
    begin(driver)
    driver.run()
    gc.collect()  # what other tests left must not go in between
    few, most = held() + one // 50, []  # some scalars beside

    def counted(leaf, target):
        here = jax.device_put(leaf, target)
        most.append(held())
        return here

    parcel = stage(prepare(trained(1), 1, cfg=CFG), jax.devices()[1], put=counted)
    assert one < max(most) - few + one // 50 <= one + largest + one // 50
    abort(parcel)
    assert held() <= few
    parcel = stage(prepare(trained(1), 1, cfg=CFG))
    publish(driver, parcel)
    assert held() <= few  # the old ones went


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p.replace(head_DV=p.head_DV[:, :-1]),
            r"head_DV of version 1 is \[64, 255\], the engine's is \[64, 256\]",
        ),
        (
            lambda p: p.replace(dense=None),
            r"version 1 has no dense.norm_mixer_D, \[1, 64\] in the engine's model",
        ),
        (
            lambda p: p.replace(mtp=weights(config.tiny(), 0).mtp),
            r"mtp.norm_embed_D \[1, 64\] of version 1 is no weight of the engine's model",
        ),
        (
            lambda p: p.replace(norm_D=p.norm_D.at[5].set(jnp.inf)),
            r"norm_D \[64\] of version 1 has entries that are not finite in float32",
        ),
        (lambda p: p.replace(norm_D=jnp.ones(64, jnp.int32)), "norm_D of version 1 is int32"),
        (lambda p: vars(p), "version 1 is a dict; give transformer.Params"),
    ],
)
def test_weights_that_are_not_the_engines_are_refused_by_the_first_leaf(change, message):
    driver = Driver(ENGINE, trained(0))
    with pytest.raises(ValueError, match=message):
        push(driver, change(trained(1)), 1, cfg=CFG)
    assert driver.stats.pushes == 0


def test_an_old_version_and_a_parcel_that_was_not_staged_are_refused():
    driver = Driver(ENGINE, trained(0), version=3)
    with pytest.raises(ValueError, match="version 3 is not newer than 3"):
        push(driver, None, 3, cfg=CFG)
    with pytest.raises(ValueError, match="version 4 were not staged"):
        publish(driver, prepare(trained(1), 4, cfg=CFG))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_async_face_pushes_beside_running_requests(policy):
    driver = Driver(ENGINE, trained(0))

    async def scene():
        asks = zip(random_prompts(6, [4, 7, 2]), (9, 12, 20), strict=True)
        tasks = [
            asyncio.create_task(driver.generate(p, Sampling(max_tokens=m, seed=m))) for p, m in asks
        ]
        await asyncio.sleep(0.02)
        with pytest.raises(ValueError, match="has no embed_VD"):
            await update(driver, {}, 1, cfg=CFG)
        await update(driver, trained(1), 1, cfg=CFG, how=Push(policy))
        late = await driver.generate([5, 6], Sampling(max_tokens=3))
        return await asyncio.gather(*tasks), late

    done, late = asyncio.run(asyncio.wait_for(scene(), 60))
    assert late.versions == (1, 1, 1)
    for completion in done:
        assert completion.finish == "length"
        assert list(completion.versions) == sorted(completion.versions)


@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=4),
    dtype=st.sampled_from(("float32", "bfloat16", "float8_e4m3fn")),
    data=st.data(),
)
@settings(max_examples=25)
def test_a_checksum_sees_one_bit_and_an_exchange_of_any_two_entries(shape, dtype, data):
    size = int(np.prod(shape))
    kind = jnp.dtype(dtype)
    bits = np.random.default_rng(size).integers(0, 256, size * kind.itemsize, np.uint8)
    word = {1: np.uint8, 2: np.uint16, 4: np.uint32}[kind.itemsize]

    def total(raw):
        return checksum(jnp.asarray(raw.view(word).view(kind).reshape(shape)))

    flipped = bits.copy()
    flipped[data.draw(st.integers(0, len(bits) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert total(flipped) != total(bits) == total(bits.copy())
    i, j = (data.draw(st.integers(0, size - 1)) for _ in range(2))
    words = bits.view(word).copy()
    words[[i, j]] = words[[j, i]]
    same = (words == bits.view(word)).all()
    assert (total(words.view(np.uint8)) == total(bits)) == same


def test_a_checksum_does_not_depend_on_the_sharding():
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    for name, spec in params_lib.leaves_with_path(transformer.specs(CFG)):
        leaf = jax.random.normal(jax.random.key(len(name)), spec.shape)
        there = jax.device_put(leaf, shardings(spec, mesh, Rules()))
        assert checksum(there) == checksum(leaf)
