"""Laws of the policy loss: goldens, NumPy twins, and one number however rows are cut or packed."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from glm45_jax.rl.batch import pack
from glm45_jax.rl.correction import IcePop, Opsm, SequenceBand, Tis
from glm45_jax.rl.loss import SequenceMean, TokenMean, count, policy_loss
from glm45_jax.rl.objective import K1, K2, K3, Cispo, Clip, Gspo, Tokens
from glm45_jax.rl.sequences import sequence_mean, sequence_sum
from tests.rl.common import rows_of, trajectories
from tests.rl.twin import twin_loss

# Fixed numbers of a public implementation (spec 7.5). If one fails, ask first which formula
# changed: the file is never refreshed from this code.
GOLDEN = Path(__file__).parents[1] / "golden" / "extra" / "rl_loss.npz"

OBJECTIVES = [Clip(), Clip(0.1, 0.1, dual=1.5), Gspo(0.1, 0.2), Cispo(1.0, 0.5)]
CHOICES = [
    {"objective": objective, "corrections": corrections, "kl": kl, "reduction": reduction}
    for objective, corrections, kl, reduction in (
        (Clip(), (), None, TokenMean()),
        (Clip(0.1, 0.3), (), K1(0.1), SequenceMean()),
        (Clip(0.1, 0.1, dual=1.5), (Tis(1.5, 0.5),), K2(0.2), TokenMean()),
        (Gspo(0.1, 0.2), (IcePop(0.5, 2.0), SequenceBand(0.7, 1.4)), K3(0.3), SequenceMean()),
        (Cispo(1.0, 0.5), (Opsm(0.1),), K3(0.3, most=0.5), TokenMean()),
    )
]
each_choice = pytest.mark.parametrize(
    "choice", CHOICES, ids=["grpo", "k1", "dual-tis-k2", "gspo-icepop-band-k3", "cispo-opsm-k3"]
)


def draw(seed, lengths, *, seq_len=9, order=None, multiple=1):
    """Rows of trajectories of these lengths, and the policy's log-probs: trajectory by trajectory
    the same numbers, whatever rows they end up in.
    """
    rng = np.random.default_rng(seed)
    made = trajectories(rng, lengths)
    advantage_N = rng.normal(size=len(made)).astype(np.float32)
    noisy = [
        [dataclasses.replace(x, logp_T=x.logp_T + noise_T) for x, noise_T in zip(made, n, strict=1)]
        for n in [
            [scale * rng.normal(size=len(x.logp_T)).astype(np.float32) for x in made]
            for scale in (0.3, 0.8, 0.5)
        ]
    ]
    order = range(len(made)) if order is None else order
    rows, old, new, reference = (
        pack(
            [one[i] for i in order],
            advantage_N[list(order)],
            seq_len=seq_len,
            pad_id=0,
            multiple=multiple,
        )
        for one in (made, *noisy)
    )
    rows = rows.replace(old_logp_BT=old.logp_BT, reference_logp_BT=reference.logp_BT)
    return rows, new.logp_BT


STATIC = ("objective", "corrections", "kl", "reduction", "clip_low", "clip_high")


@functools.partial(jax.jit, static_argnames=STATIC)
def value_and_gradient(logp_BT, rows, **options):
    def scalar(logp_BT):
        out = policy_loss(logp_BT, rows, **options)
        return out.loss, out

    return jax.value_and_grad(scalar, has_aux=True)(logp_BT)


def loss_and_gradient(logp_BT, rows, **options):
    (_, out), d_BT = value_and_gradient(jnp.asarray(logp_BT), rows, **options)
    return out, np.asarray(d_BT)


def by_trajectory(rows, x_BT):
    """x of every trajectory, by its tokens."""
    found = {}
    for b, segments_T in enumerate(rows.batch.segments_BT):
        for segment in range(1, segments_T.max() + 1):
            inside_T = segments_T == segment
            found[rows.batch.tokens_BT[b][inside_T].tobytes()] = x_BT[b][inside_T]
    return found


def assert_same(a, b):
    """Two losses, their parts and counts, equal up to the order of float32 sums."""
    assert a.parts.keys() == b.parts.keys()
    assert_allclose(a.loss, b.loss, atol=2e-6, rtol=2e-6)
    assert_array_equal(a.tokens, b.tokens)
    for name, part in a.parts.items():
        assert_allclose(part, b.parts[name], atol=2e-6, rtol=2e-6, err_msg=name)


# --- goldens


def golden_tokens(g):
    advantage_BT = jnp.broadcast_to(g["adv_normalised"][:, None], g["loss_mask"].shape)
    segments_BT = np.ones(g["loss_mask"].shape, np.int32)
    names = ("new_logp", "old_logp", "rollout_logp")
    arrays = (*(g[name] for name in names), advantage_BT, g["loss_mask"], segments_BT)
    return Tokens(*map(jnp.asarray, arrays))


def golden_values(g):
    """Ours, by the golden's names."""
    t = golden_tokens(g)
    ours = {}
    clips = {"ppo": Clip(0.2, 0.2), "clip_higher": Clip(0.2, 0.28), "dual": Clip(0.2, 0.28, 3.0)}
    rows = rows_of(g["old_logp"], t.advantage_BT, g["loss_mask"])
    for name, clip in clips.items():
        ours[f"{name}_token_loss"], ours[f"{name}_clipfrac_token"] = clip.token_loss(t)
        for mean, reduction in (("token", TokenMean()), ("sample", SequenceMean())):
            out = policy_loss(g["new_logp"], rows, objective=clip, reduction=reduction)
            ours[f"{name}_loss_{mean}_mean"] = out.loss
    ours["cispo_token_loss"] = Cispo(0.2, 0.28).token_loss(t)[0]
    ours["gspo_token_loss"] = Gspo(3e-4, 4e-4).token_loss(t)[0]
    ours["gspo_kl"] = sequence_mean(t.old_logp_BT - t.logp_BT, t.weight_BT, t.segments_BT)
    kls = {"k1": K1(1.0), "k2": K2(1.0), "k3": K3(1.0), "low_var_kl": K3(1.0, most=10)}
    for name, kl in kls.items():
        ours[f"kl_{name}"] = kl.token_kl(t.logp_BT, t.engine_logp_BT)
    ours["tis_weight_raw"] = Tis(np.inf).weight(t)
    ours["tis_weight_clip0_2"] = Tis(2.0).weight(t)
    ours["icepop_weight_0.5_2"] = IcePop(0.5, 2.0).weight(t)
    ours["opsm_mask_delta0.05"] = Opsm(0.05).weight(t)
    return ours


def test_every_array_equals_the_golden():
    g = dict(np.load(GOLDEN))
    ours = jax.jit(golden_values)(g)
    given_ = {"old_logp", "new_logp", "rollout_logp", "loss_mask", "rewards"}
    advantages = {"adv_mean_only", "adv_normalised"}  # test_advantage.py
    assert ours.keys() == g.keys() - given_ - advantages
    for name, value in ours.items():
        # 1e-6 is the spec's; the entries go up to 3, where float32 resolves 2.4e-7.
        assert_allclose(np.asarray(value, np.float32), g[name], atol=1e-6, rtol=0, err_msg=name)


def test_the_contract_call_is_ppo_with_these_bounds_and_grpo_the_default():
    g = dict(np.load(GOLDEN))
    rows = rows_of(g["old_logp"], golden_tokens(g).advantage_BT, g["loss_mask"])
    out = policy_loss(g["new_logp"], rows, clip_low=0.2, clip_high=0.2)
    assert_allclose(out.loss, g["ppo_loss_token_mean"], atol=1e-6)
    assert_array_equal(out.tokens, g["loss_mask"].sum())
    clipped = (g["ppo_clipfrac_token"] * g["loss_mask"]).sum() / g["loss_mask"].sum()
    assert_allclose(out.parts["clip_fraction"], clipped, atol=1e-6)
    assert_allclose(policy_loss(g["new_logp"], rows).loss, g["clip_higher_loss_token_mean"], 1e-5)


# --- twins


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    choice=st.sampled_from(CHOICES),
)
def test_loss_equals_its_numpy_twin(lengths, seed, choice):
    rows, logp_BT = draw(seed, lengths, multiple=4)
    ours, _ = loss_and_gradient(logp_BT, rows, **choice)
    assert_allclose(ours.loss, twin_loss(logp_BT, rows, **choice), atol=1e-5, rtol=1e-5)


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_sums_over_segments_equal_a_loop(lengths, seed):
    segments_T = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    segments_BT = np.pad(segments_T, (0, 20 - len(segments_T)))[None].astype(np.int32)
    x_BT = np.random.default_rng(seed).normal(size=segments_BT.shape).astype(np.float32)
    same_TT = segments_BT[0][:, None] == segments_BT[0][None, :]
    ours_BT = jax.jit(sequence_sum)(x_BT, segments_BT)
    assert_allclose(ours_BT[0], same_TT @ x_BT[0], atol=1e-5)


# --- what the policy did not write


@each_choice
def test_gradient_is_exactly_zero_where_the_policy_did_not_write(choice):
    rows, logp_BT = draw(0, (6, 4, 3, 9), multiple=4)
    written_BT = rows.weight_BT > 0
    clean, clean_BT = loss_and_gradient(logp_BT, rows, **choice)
    assert_array_equal(clean_BT[~written_BT], 0)
    assert np.abs(clean_BT[written_BT]).max() > 0
    for garbage in (np.nan, np.inf, -np.inf, 1e30):

        def spoil(x_BT, garbage=garbage):
            return np.where(written_BT, x_BT, np.float32(garbage))

        dirty = rows.replace(
            logp_BT=spoil(rows.logp_BT),
            old_logp_BT=spoil(rows.old_logp_BT),
            reference_logp_BT=spoil(rows.reference_logp_BT),
            advantage_BT=spoil(rows.advantage_BT),
        )
        out, d_BT = loss_and_gradient(spoil(logp_BT), dirty, **choice)
        assert_array_equal(d_BT, clean_BT)
        assert_array_equal(out.loss, clean.loss)


@each_choice
def test_a_batch_of_nothing_costs_nothing(choice):
    rows, logp_BT = draw(0, (6, 4), multiple=4)
    nothing = rows.replace(weight_BT=np.zeros_like(rows.weight_BT))
    out, d_BT = loss_and_gradient(logp_BT, nothing, **choice)
    assert_array_equal([out.loss, out.tokens, *out.parts.values()], 0)
    assert_array_equal(d_BT, 0)


# --- one number, however rows are made and cut


@each_choice
def test_padding_packing_and_order_change_neither_loss_nor_gradient(choice):
    lengths = (6, 4, 3, 5, 2)
    rows, logp_BT = draw(1, lengths, multiple=4)
    whole, d_BT = loss_and_gradient(logp_BT, rows, **choice)
    expected = by_trajectory(rows, d_BT)
    for seq_len, order in ((6, (4, 2, 0, 3, 1)), (20, (3, 1, 4, 0, 2))):
        other_rows, other_BT = draw(1, lengths, seq_len=seq_len, order=order)
        other, other_d_BT = loss_and_gradient(other_BT, other_rows, **choice)
        assert_same(other, whole)
        found = by_trajectory(other_rows, other_d_BT)
        assert found.keys() == expected.keys()
        for key, d_T in expected.items():
            assert_allclose(found[key], d_T, atol=1e-6, rtol=1e-5)


@each_choice
def test_micro_batches_with_global_counts_add_up_to_the_whole(choice):
    rows, logp_BT = draw(2, (9, 9, 8, 2, 7, 9, 3, 6, 9, 7), multiple=8)
    assert len(logp_BT) == 8
    whole, d_BT = loss_and_gradient(logp_BT, rows, **choice)
    counts = count(rows)
    shares = []
    for part in (slice(0, 2), slice(2, 4), slice(4, 8)):
        micro = jax.tree.map(lambda x, part=part: x[part], rows)
        out, micro_d = loss_and_gradient(logp_BT[part], micro, counts=counts, **choice)
        assert_allclose(micro_d, d_BT[part], atol=1e-7, rtol=1e-6)
        shares.append(out)
    assert len({float(out.tokens) for out in shares}) == 3  # a mean of means would be another
    assert_same(jax.tree.map(lambda *x: sum(x), *shares), whole)


@each_choice
def test_devices_that_sum_counts_and_losses_agree_with_one(choice):
    rows, logp_BT = draw(3, (9, 6, 8, 9), multiple=4)

    @functools.partial(jax.pmap, axis_name="data")
    def on_devices(logp_BT, rows):
        counts = jax.lax.psum(count(rows), "data")

        def scalar(logp_BT):
            out = policy_loss(logp_BT, rows, counts=counts, **choice)
            return out.loss, out

        (_, out), d_BT = jax.value_and_grad(scalar, has_aux=True)(logp_BT)
        return jax.lax.psum(out, "data"), d_BT

    whole, d_BT = loss_and_gradient(logp_BT, rows, **choice)
    split = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (logp_BT, rows))
    out, split_d = on_devices(*split)
    assert_same(jax.tree.map(lambda x: x[0], out), whole)
    assert_allclose(split_d.reshape(d_BT.shape), d_BT, atol=1e-7, rtol=1e-6)


def test_a_token_mean_weighted_by_one_over_length_is_the_sequence_mean():
    rows, logp_BT = draw(4, (6, 4, 3, 5), multiple=4)
    length_BT = sequence_sum(rows.weight_BT, rows.batch.segments_BT)
    weighted = rows.replace(weight_BT=rows.weight_BT / np.maximum(length_BT, 1))
    by_weight, d_BT = loss_and_gradient(logp_BT, weighted, reduction=TokenMean())
    by_sequence, expected_BT = loss_and_gradient(logp_BT, rows, reduction=SequenceMean())
    assert_allclose(by_weight.loss, by_sequence.loss, rtol=1e-6)
    assert_allclose(d_BT, expected_BT, atol=1e-7, rtol=1e-6)


# --- on-policy, clips and weights


@pytest.mark.parametrize("objective", [*OBJECTIVES, Clip(0.0, 0.0), Gspo()], ids=str)
def test_the_first_step_on_policy_is_reinforce_and_nothing_is_clipped(objective):
    rows, _ = draw(5, (6, 4, 3), multiple=4)
    out, d_BT = loss_and_gradient(rows.old_logp_BT, rows, objective=objective)
    N = rows.weight_BT.sum()
    assert_allclose(d_BT, -rows.advantage_BT * rows.weight_BT / N, atol=1e-7)
    assert_array_equal([out.parts["clip_fraction"], out.parts["drift_kl"]], 0)
    if not isinstance(objective, Cispo):
        assert_allclose(out.loss, -(rows.advantage_BT * rows.weight_BT).sum() / N, atol=1e-6)


def test_without_old_log_probs_the_engines_are_the_old_ones():
    rows, logp_BT = draw(6, (6, 4))
    same = rows.replace(logp_BT=rows.old_logp_BT)
    assert_array_equal(
        policy_loss(logp_BT, same.replace(old_logp_BT=None)).loss, policy_loss(logp_BT, same).loss
    )


@pytest.mark.parametrize("advantage, far", [(1.0, 2.0), (-1.0, -2.0)])
def test_a_token_beyond_the_clip_has_no_gradient_and_cispo_gives_it_one(advantage, far):
    rows = rows_of(*(np.full((1, 2), x, np.float32) for x in (-3.0, advantage, 1.0)))
    logp_BT = np.array([[-3.0, -3.0 + far]], np.float32)
    out, d_BT = loss_and_gradient(logp_BT, rows, clip_low=0.2, clip_high=0.28)
    assert d_BT[0, 0] != 0 and d_BT[0, 1] == 0
    assert_allclose(out.parts["clip_fraction"], 0.5)
    assert loss_and_gradient(logp_BT, rows, objective=Cispo())[1].all()


def test_dual_clip_bounds_what_a_bad_token_costs():
    rows = rows_of(*(np.full((1, 1), x, np.float32) for x in (-9.0, -2.0, 1.0)))
    logp_BT = np.full((1, 1), -1.0, np.float32)
    out, d_BT = loss_and_gradient(logp_BT, rows, objective=Clip(dual=3.0))
    assert_allclose(out.loss, 6.0)
    assert_array_equal(d_BT, 0)
    assert loss_and_gradient(logp_BT, rows, objective=Clip())[0].loss > 1000


@each_choice
def test_a_policy_far_away_gives_finite_numbers(choice):
    rows, logp_BT = draw(7, (6, 4, 3), multiple=4)
    for distance in (-1000, 1000):
        out, d_BT = loss_and_gradient(logp_BT + np.float32(distance), rows, **choice)
        assert np.isfinite([out.loss, *out.parts.values()]).all()
        assert np.isfinite(d_BT).all()


@pytest.mark.parametrize("correction", [Tis(1.1), IcePop(0.8, 1.25), SequenceBand(0.8, 1.1)])
def test_weights_of_the_mismatch_have_no_gradient_and_scale_that_of_the_loss(correction):
    rows, logp_BT = draw(8, (6, 4, 3, 5), multiple=4)
    _, plain_BT = loss_and_gradient(logp_BT, rows)
    out, d_BT = loss_and_gradient(logp_BT, rows, corrections=(correction,))
    t = Tokens(
        logp_BT=jnp.asarray(logp_BT),
        old_logp_BT=jnp.asarray(rows.old_logp_BT),
        engine_logp_BT=jnp.asarray(rows.logp_BT),
        advantage_BT=jnp.asarray(rows.advantage_BT),
        weight_BT=jnp.asarray(rows.weight_BT),
        segments_BT=jnp.asarray(rows.batch.segments_BT),
    )
    weight_BT = np.asarray(correction.weight(t))
    assert_allclose(d_BT, weight_BT * plain_BT, atol=1e-7)
    slopes = jax.grad(lambda t: correction.weight(t).sum(), allow_int=True)(t)
    for name in ("logp_BT", "old_logp_BT", "engine_logp_BT", "advantage_BT", "weight_BT"):
        assert_array_equal(getattr(slopes, name), 0)
    dropped = rows.weight_BT[weight_BT == 0].sum() / rows.weight_BT.sum()
    assert_allclose(out.parts["dropped"], dropped, atol=1e-6)


@pytest.mark.parametrize("correction", [Tis(), IcePop(0.5, 2.0), SequenceBand(0.9, 1.1)])
def test_where_engine_and_trainer_agree_a_correction_does_nothing(correction):
    rows, logp_BT = draw(9, (6, 4, 3), multiple=4)
    agreeing = rows.replace(old_logp_BT=rows.logp_BT)
    out, _ = loss_and_gradient(logp_BT, agreeing, corrections=(correction,))
    assert_array_equal(out.loss, loss_and_gradient(logp_BT, agreeing)[0].loss)
    assert_array_equal([out.parts["mismatch_kl"], out.parts["dropped"]], 0)


def test_opsm_drops_bad_sequences_that_the_policy_has_left_and_no_others():
    old_BT = np.full((4, 3), -1.0, np.float32)
    advantage_BT = np.repeat(np.float32([[-1], [-1], [1], [1]]), 3, axis=1)
    logp_BT = old_BT + np.float32([[-0.5], [0.5], [-0.5], [0.5]])
    rows = rows_of(old_BT, advantage_BT, np.ones((4, 3), np.float32))
    out, d_BT = loss_and_gradient(logp_BT, rows, objective=Cispo(), corrections=(Opsm(0.1),))
    assert_array_equal((d_BT != 0).all(axis=1), [False, True, True, True])
    assert_allclose(out.parts["dropped"], 0.25)


def test_gradients_of_the_kl_estimators_are_those_their_docstrings_claim():
    """Over a whole vocabulary: the mean over p of the estimator's gradient."""
    score_V, reference_V = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)
    log_q_V = jax.nn.log_softmax(jnp.asarray(reference_V))

    def mean_gradient(kl):
        def expected(score_V):
            logp_V = jax.nn.log_softmax(score_V)
            return (jax.lax.stop_gradient(jnp.exp(logp_V)) * kl.token_kl(logp_V, log_q_V)).sum()

        return jax.grad(expected)(jnp.asarray(score_V))

    def forward_kl(score_V):
        logp_V = jax.nn.log_softmax(score_V)
        return (jnp.exp(logp_V) * (logp_V - log_q_V)).sum()

    def backward_kl(score_V):
        return (jnp.exp(log_q_V) * (log_q_V - jax.nn.log_softmax(score_V))).sum()

    assert_allclose(mean_gradient(K1(1.0)), 0, atol=1e-6)
    assert_allclose(mean_gradient(K2(1.0)), jax.grad(forward_kl)(score_V), atol=1e-6)
    assert_allclose(mean_gradient(K3(1.0)), jax.grad(backward_kl)(score_V), atol=1e-6)


# --- doors


def test_what_does_not_fit_together_is_refused():
    rows, logp_BT = draw(0, (6, 4))
    bare = rows.replace(old_logp_BT=None, reference_logp_BT=None)
    with pytest.raises(ValueError, match="give one; an objective has bounds"):
        policy_loss(logp_BT, rows, objective=Gspo(), clip_low=0.2)
    with pytest.raises(ValueError, match=r"logp_BT is \(2, 8\), weight_BT is \(2, 9\)"):
        policy_loss(logp_BT[:, 1:], rows)
    with pytest.raises(ValueError, match="needs reference_logp_BT"):
        policy_loss(logp_BT, bare, kl=K3(0.1))
    with pytest.raises(ValueError, match="needs old_logp_BT"):
        policy_loss(logp_BT, bare, corrections=(Opsm(), Tis()))
    policy_loss(logp_BT, bare, corrections=(Opsm(),))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Clip(low=1.5),
        lambda: Clip(dual=0.5),
        lambda: Gspo(high=-0.1),
        lambda: Cispo(low=-0.1),
        lambda: Tis(cap=-1.0),
        lambda: IcePop(2.0, 0.5),
        lambda: SequenceBand(-0.5, 2.0),
    ],
)
def test_bounds_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError):
        make()
