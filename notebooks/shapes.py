# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Shapes: one document at every stop of the walk
#
# Question: what are the arrays between a text and its loss, and between a prompt and its next
# token: their names, shapes, dtypes and sizes? Runtime: about a minute on a CPU, with `tiny()` and
# random weights. Letters are those of docs/legend.md: B rows, T places, D width, V vocabulary,
# N heads, K key-value heads, H width of a head, E experts, A experts a token, R routed rows.

# %%
import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from glm45_jax import params as params_lib
from glm45_jax.data.fim import Fim, Mark, fim
from glm45_jax.data.loader import Loader
from glm45_jax.data.pack import BestFit
from glm45_jax.data.sources import PydocTopics
from glm45_jax.data.store import open_store, write_store
from glm45_jax.kernels.attention import attention
from glm45_jax.kernels.grouped_matmul import grouped_matmul
from glm45_jax.kernels.routing import combine, permute, route
from glm45_jax.model import block as blocks
from glm45_jax.model import config, mtp, transformer
from glm45_jax.model.moe import swiglu
from glm45_jax.model.norm import rms_norm
from glm45_jax.model.rope import rotate
from glm45_jax.optim.muon import Muon
from glm45_jax.rollout.sampling import Sampling, knobs, sample
from glm45_jax.tokenizer import END_OF_TEXT, train_bpe
from glm45_jax.train.loss import Weights, count, cross_entropy_sum, mtp_mask
from glm45_jax.train.step import gradients, move_bias

stops = []


def stop(name, array):
    """Writes one array down, and hands it on."""
    stops.append((name, array.shape, array.dtype, array.size * array.dtype.itemsize))
    print(f"{name:14} {array.shape!s:22} {array.dtype!s:9} {stops[-1][3]:>10,} bytes")
    return array


# %% [markdown]
# ## Text to tokens
#
# A `Doc` is a text with a name and where it is from. The tokenizer works on bytes: every text has
# tokens, and decoding gives the text back exactly.

# %%
docs = {doc.id: doc for doc in PydocTopics().docs()}
doc = docs["pydoc/assert"]
print(doc.id, dict(doc.meta), f"{len(doc.text):,} characters")
tokenizer = train_bpe([doc.text for doc in docs.values()], 512)
ids = tokenizer.encode(doc.text)
assert tokenizer.decode(ids) == doc.text
print(
    f"{len(ids)} tokens of {tokenizer.vocab}:", " | ".join(tokenizer.decode([i]) for i in ids[:24])
)

# %% [markdown]
# Documents of code may be told in another order first, so that a model learns to fill in a middle.
# That happens between text and tokens, with three tokens of their own.

# %%
for how in (Fim(rate=1.0, spm=0.0), Fim(rate=1.0, spm=1.0)):
    parts = fim("def add(a, b):\n    return a + b\n", doc_id="example", how=how)
    print(" ".join(part.name if isinstance(part, Mark) else repr(part) for part in parts))

# %% [markdown]
# ## Tokens to a batch
#
# A store is one array of all tokens and the places where documents begin. Rows of T places are made
# from it (here whole documents, see `notebooks/packing.py`), and a `Loader` says which rows are the
# batch of a step: a pure function of seed and step.

# %%
folder = pathlib.Path(tempfile.mkdtemp())
texts = [doc.text] + [other.text for other in docs.values() if other.id != doc.id]
write_store(
    folder / "store",
    tokenizer.encode_batch(texts),
    end=tokenizer.id_of(END_OF_TEXT),
    vocab=tokenizer.vocab,
    tokenizer_fingerprint=tokenizer.fingerprint,
    meta={},
)
store = open_store(folder / "store")
stop("offsets_N1", store.offsets_N1)
stop("document", store.read(int(store.offsets_N1[0]), int(store.offsets_N1[1])))
B, T = 4, 1024
rows = BestFit().rows(store, T, tokenizer.id_of(END_OF_TEXT))
loader = Loader([(rows, 1.0)], seed=0, span=lambda step: (step * B, B), fingerprint="")
own = next(i for i in range(len(rows)) if doc.text in tokenizer.decode(rows[i]["tokens"]))
step = next(s for s in range(len(rows)) if own in loader.row_ids(s * B, B))
batch = loader.batch(step)
b = loader.row_ids(step * B, B).tolist().index(own)
print(f"row {own} of {len(rows)} holds the document; it is row {b} of the batch of step {step}")
for name in ("tokens", "targets", "segments", "positions", "mask"):
    stop(f"{name}_BT", getattr(batch, f"{name}_BT"))

# %% [markdown]
# Each picture is the batch: B rows of T places. Positions begin anew in each document; the mask is
# 0 (dark) where there is nothing to predict: the last token of a document, and padding.

# %%
figure, panels = plt.subplots(2, 2, figsize=(12, 3.4), layout="constrained", sharex=True)
for axes, name in zip(panels.flat, ("tokens", "segments", "positions", "mask"), strict=True):
    image = np.asarray(getattr(batch, f"{name}_BT"))
    drawn = axes.imshow(image, aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(drawn, ax=axes)
    axes.set_title(f"{name}_BT {image.dtype}")
    axes.set_yticks(range(B))
plt.show()

# %% [markdown]
# ## Into the model: one dense layer, opened
#
# Everything below is what `block` does, by hand; the last line compares. Weights of all layers of a
# kind lie in one array with a leading L, so that a loop over layers is one `lax.scan`.

# %%
cfg = config.tiny(vocab=tokenizer.vocab)
plan = transformer.specs(cfg)
params = params_lib.init(plan, jax.random.key(0))
tokens_BT, segments_BT, positions_BT = batch.tokens_BT, batch.segments_BT, batch.positions_BT
flow = transformer.make_flow(cfg, (B, T), positions_BT, segments_BT)
x_BTD = stop("x_BTD", transformer.embed(params, tokens_BT, cfg))
layer = jax.tree.map(lambda w: w[0], params.dense)  # the first dense layer
heads, eps = layer.mixer, cfg.norm_eps
normed_BTD = rms_norm(x_BTD, layer.norm_mixer_D, eps)
q_BTNH = jnp.einsum("btd,dnh->btnh", normed_BTD, heads.q_DNH) + heads.q_bias_NH[None, None]
k_BTKH = jnp.einsum("btd,dkh->btkh", normed_BTD, heads.k_DKH) + heads.k_bias_KH[None, None]
v_BTKH = jnp.einsum("btd,dkh->btkh", normed_BTD, heads.v_DKH) + heads.v_bias_KH[None, None]
q_BTNH = stop("q_BTNH", rotate(rms_norm(q_BTNH, heads.q_norm_H, eps), flow.turn))
k_BTKH = stop("k_BTKH", rotate(rms_norm(k_BTKH, heads.k_norm_H, eps), flow.turn))
stop("v_BTKH", v_BTKH)
where = dict(segments_BT=segments_BT, positions_BT=positions_BT, positions_BS=positions_BT)
mixed_BTNH = stop("mixed_BTNH", attention(q_BTNH, k_BTKH, v_BTKH, **where))
x1_BTD = x_BTD + jnp.einsum("btnh,nhd->btd", mixed_BTNH, heads.out_NHD)
gate_BTF = jnp.einsum("btd,df->btf", rms_norm(x1_BTD, layer.norm_ffn_D, eps), layer.ffn.gate_DF)
stop("gate_BTF", gate_BTF)
x1_BTD = stop("x1_BTD", x1_BTD + swiglu(layer.ffn, rms_norm(x1_BTD, layer.norm_ffn_D, eps)))
whole_BTD, _ = blocks.block(layer, x_BTD, flow, cfg=cfg)
np.testing.assert_allclose(x1_BTD, whole_BTD, atol=1e-5)

# %% [markdown]
# The scores of attention are T × T for each head and row, the largest thing here by far; fast
# kernels never hold them. `tests` and small CPUs do.

# %%
print(f"scores of {cfg.mixer.heads} heads: {B * cfg.mixer.heads * T * T * 4:,} bytes in float32")

# %% [markdown]
# ## A MoE layer, opened
#
# The router scores every expert for every token (float32, always), keeps A of E, and the rows are
# sorted by expert so that each expert is one product over its own rows. Nothing is dropped: R is
# B · T · A, however uneven the experts are.

# %%
layer = jax.tree.map(lambda w: w[0], params.moe)
mixed_BTD, _ = cfg.mixer(
    layer.mixer,
    rms_norm(x1_BTD, layer.norm_mixer_D, eps),
    turn=flow.turn,
    positions_BT=positions_BT,
    segments_BT=segments_BT,
    eps=eps,
    impl="auto",
)
residual_BTD = x1_BTD + mixed_BTD
x_MD = rms_norm(residual_BTD, layer.norm_ffn_D, eps).reshape(B * T, -1)
logits_ME = stop("logits_ME", x_MD @ layer.ffn.router_DE)
sent = route(logits_ME, layer.ffn.bias_E, top_k=cfg.moe.top_k, scale=cfg.moe.scale)
stop("expert_MA", sent.expert_MA)
stop("gate_MA", sent.gate_MA)
stop("order_R", sent.order_R)
stop("rows_E", sent.rows_E)
x_RD = stop("x_RD", permute(x_MD, sent.order_R))
gate_RF, up_RF = (
    grouped_matmul(x_RD, w, sent.rows_E) for w in (layer.ffn.gate_EDF, layer.ffn.up_EDF)
)
h_RF = stop("h_RF", jax.nn.silu(gate_RF) * up_RF)
y_RD = grouped_matmul(h_RF, layer.ffn.down_EFD, sent.rows_E)
y_MD = stop("y_MD", combine(y_RD, sent.gate_MA, sent.order_R))
x2_BTD = residual_BTD + y_MD.reshape(B, T, -1) + swiglu(layer.ffn.shared, x_MD.reshape(B, T, -1))
whole_BTD, out = blocks.block(layer, x1_BTD, flow, cfg=cfg)
np.testing.assert_allclose(x2_BTD, whole_BTD, atol=1e-4)
stop("load_E", out.load_E)  # as rows_E, padding not counted
print("rows of each expert", sent.rows_E, "of them of text", out.load_E)

# %% [markdown]
# ## Out of the model: losses
#
# Hidden states after the final norm go to the loss and to the MTP layer, which joins hidden state i
# with the embedding of token i + 1 and guesses token i + 2. All logits at once would be the largest
# array of training (V is 151,552 in GLM-4.5): cross-entropy runs over chunks of the vocabulary.

# %%
documents = dict(cfg=cfg, positions_BT=positions_BT, segments_BT=segments_BT)
hidden = transformer.forward(params, tokens_BT, **documents)
stop("hidden_BTD", hidden.hidden_BTD)
stop("load_LE", hidden.load_LE)
stop("router_LBTE", hidden.router_logits_LBTE)
ahead_BTD = stop("ahead_BTD", mtp.forward(params, hidden.hidden_BTD, tokens_BT, **documents))
denominators = count(batch)
nll = functools.partial(cross_entropy_sum, params, cfg=cfg)
ce = nll(hidden.hidden_BTD, batch.targets_BT, batch.mask_BT) / denominators.tokens
of_mtp = nll(ahead_BTD, batch.targets_BT[:, 1:], mtp_mask(batch)) / denominators.mtp_tokens
stop("loss/ce", ce)
stop("loss/mtp", of_mtp)
print(f"{ce:.4f} and {of_mtp:.4f} nats a token; a uniform guess is {np.log(cfg.vocab):.4f}")

# %% [markdown]
# ## Back: gradients, updates, and what moves without a gradient
#
# A gradient has the shape of its weight. Its kind decides who moves it; the router's bias (kind
# "state") moves by the sign of its load. Reported here: sums over all weights of a kind.

# %%
weights = Weights(jnp.float32(0.3), jnp.float32(1e-4))
take = jax.jit(lambda p, b: gradients(p, b, weights, cfg=cfg, packed=True))
grads, losses = take(params, batch)
np.testing.assert_allclose(losses.parts["ce"], ce, rtol=1e-5)
tx = Muon(dtype="float32").build(plan)
updates, _ = jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(grads, params)
sizes = {}
for (path, spec), update in zip(
    params_lib.leaves_with_path(plan), jax.tree.leaves(updates), strict=True
):
    assert update.shape == spec.shape, path
    sizes[spec.kind] = sizes.get(spec.kind, 0) + update.size
print("weights by kind:", sizes)
moved = move_bias(params, losses.load_LE, jnp.float32(1e-3))
print("bias of the first MoE layer:", moved.moe.ffn.bias_E[0])

# %% [markdown]
# ## A prompt to a token
#
# The same weights, the same functions, one cache. A prompt is read at once and its keys and values
# are kept in pages; after that every step has T = 1. The token and its log-probability come from
# one softmax.

# %%
prompt_BT = np.asarray([ids[:40]], np.int32)
cache = transformer.empty_cache(cfg, rows=1, max_tokens=64)
stop("k_LPSKH", cache.k_LPSKH)
stop("table_BP", cache.table_BP)
told, cache = transformer.decode(params, prompt_BT, cache, cfg=cfg)
stop("prompt's hidden", told.hidden_BTD)
logits_BV = stop("logits_BV", transformer.logits(params, told, cfg=cfg)[:, -1])
drawn = sample(logits_BV, knobs([Sampling(temperature=0.8)]), jnp.zeros(1, jnp.int32))
stop("token_B", drawn.token_B)
told, cache = transformer.decode(params, drawn.token_B[:, None], cache, cfg=cfg)
stop("next hidden", told.hidden_BTD)
full_BT = np.concatenate([prompt_BT, np.asarray(drawn.token_B)[:, None]], axis=1)
again = transformer.forward(params, full_BT, cfg=cfg).hidden_BTD[:, -1:]
np.testing.assert_allclose(told.hidden_BTD, again, atol=1e-4)  # the cache forgets nothing
print(repr(tokenizer.decode(prompt_BT[0])), "->", repr(tokenizer.decode(drawn.token_B.tolist())))

# %% [markdown]
# ## All stops, and the same at full size
#
# `jax.eval_shape` runs the code without arrays. So the second picture is the real GLM-4.5, one row
# of 4,096 tokens in bfloat16, and takes no memory.

# %%
big = config.glm45()
wide = jax.eval_shape(lambda: params_lib.init(transformer.specs(big), jax.random.key(0)))
row_BT = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
of_big = jax.eval_shape(functools.partial(transformer.forward, cfg=big), wide, row_BT)
logits = jax.eval_shape(functools.partial(transformer.logits, cfg=big), wide, of_big.hidden_BTD)
cached = jax.eval_shape(lambda: transformer.empty_cache(big, rows=1, max_tokens=4096))
M, moe, gqa = 4096, big.moe, big.mixer
arrays = {
    "tokens_BT": row_BT,
    "x_BTD": of_big.hidden_BTD,
    "q_BTNH": jax.ShapeDtypeStruct((1, M, gqa.heads, gqa.head_dim), jnp.bfloat16),
    "scores (never held)": jax.ShapeDtypeStruct((1, gqa.heads, M, M), jnp.float32),
    "router_LBTE": of_big.router_logits_LBTE,
    "x_RD": jax.ShapeDtypeStruct((M * moe.top_k, big.d_model), jnp.bfloat16),
    "h_RF": jax.ShapeDtypeStruct((M * moe.top_k, moe.d_expert), jnp.bfloat16),
    "hidden_BTD": of_big.hidden_BTD,
    "logits_BTV (never held)": logits,
    "keys, all layers": cached.k_LPSKH,
    "gates of one layer's experts": jax.ShapeDtypeStruct(
        wide.moe.ffn.gate_EDF.shape[1:], jnp.bfloat16
    ),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(13, 7), layout="constrained")
names = [f"{name}  {shape}" for name, shape, _, _ in stops]
left.barh(range(len(stops)), [size for *_, size in stops], color="C0")
left.set_yticks(range(len(stops)), names, fontsize=7)
left.set(xscale="log", xlabel="bytes", title=f"tiny(), {B} rows of {T}")
right.barh(
    range(len(arrays)),
    [a.size * a.dtype.itemsize / 2**20 for a in arrays.values()],
    color=["C3" if "never" in name else "C0" for name in arrays],
)
right.set_yticks(
    range(len(arrays)), [f"{n}  {a.shape} {a.dtype}" for n, a in arrays.items()], fontsize=7
)
right.set(xscale="log", xlabel="MiB", title="glm45(), one row of 4,096")
for axes in (left, right):
    axes.invert_yaxis()
plt.show()
