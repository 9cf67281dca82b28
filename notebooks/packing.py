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
# # Packing: cut the text anywhere, or fit whole documents into rows?
#
# Question: what does a row of a batch hold, how many documents are torn apart, and what does
# keeping them whole cost in padding? Pretraining cuts, mid-training fits (spec 5.3). Runtime: half
# a minute on a CPU, on the text that Python ships.

# %%
import pathlib
import tempfile

import matplotlib.pyplot as plt
import numpy as np

from glm45_jax.data.pack import BestFit, Cut, best_fit, split_long
from glm45_jax.data.sources import PydocTopics, PythonSources
from glm45_jax.data.store import open_store, write_store
from glm45_jax.tokenizer import END_OF_TEXT, train_bpe

# %% [markdown]
# ## Documents have all lengths
#
# A token store is one long array and the places where documents begin. Its lengths, the end token
# included, are all that packing needs to know.

# %%
docs = [*PydocTopics().docs(), *list(PythonSources().docs())[:150]]
order = np.random.default_rng(0).permutation(len(docs))  # stores are in hash order, not by source
texts = [docs[i].text for i in order]
tokenizer = train_bpe(texts[:60], 2048)
folder = pathlib.Path(tempfile.mkdtemp())
manifest = write_store(
    folder / "store",
    tokenizer.encode_batch(texts),
    end=tokenizer.id_of(END_OF_TEXT),
    vocab=tokenizer.vocab,
    tokenizer_fingerprint=tokenizer.fingerprint,
    meta={},
)
store = open_store(folder / "store")
length_N = np.diff(store.offsets_N1)
print(f"{manifest.n_docs} documents, {manifest.n_tokens:,} tokens as {manifest.dtype}")
print("shortest, median, longest:", length_N.min(), int(np.median(length_N)), length_N.max())

# %%
figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
axes.hist(length_N, bins=np.geomspace(length_N.min(), length_N.max(), 40), color="C0")
for seq_len in (1024, 4096, 32768):
    axes.axvline(seq_len, color="C3", linestyle=":")
    axes.text(seq_len * 1.05, 18, f"{seq_len:,}", color="C3")
axes.set(xscale="log", xlabel="tokens of a document", ylabel="documents", ylim=(0, 20))
axes.set_title("Lengths, and three lengths of rows")
plt.show()

# %% [markdown]
# ## The same text, packed twice
#
# Each strip is a row of 4,096 places, each colour a document. Cut rows are full, and most begin and
# end in the middle of something; rows of the third kind begin with a document or with a piece of
# one that is longer than a row, and grey is padding.

# %%
T = 4096
pad_id = tokenizer.id_of(END_OF_TEXT)
kinds = {
    "Cut()": Cut(),
    "Cut(document_mask=True)": Cut(document_mask=True),
    "BestFit()": BestFit(),
}
rows = {name: kind.rows(store, T, pad_id) for name, kind in kinds.items()}
shown = np.linspace(0, len(rows["BestFit()"]) - 1, 16).astype(int)
colours = plt.get_cmap("tab20").copy()
colours.set_bad("#d9d9d9")
figure, panels = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained", sharey=True)
for axes, (name, source) in zip(panels, rows.items(), strict=True):
    taken = source.take(shown % len(source))
    segments_RT = np.broadcast_to(taken["segments"], (len(shown), T))
    image = np.ma.masked_where(segments_RT == 0, segments_RT + 7 * np.arange(len(shown))[:, None])
    axes.imshow(image % 20, cmap=colours, vmin=0, vmax=19, aspect="auto", interpolation="nearest")
    axes.set(title=f"{name}: {len(source):,} rows", xlabel="place in the row")
panels[0].set_ylabel("some rows")
plt.show()

# %% [markdown]
# The model sees the difference as five arrays. With segments no token looks into another document,
# positions begin at 0 in each, and the last token of a document predicts nothing.

# %%
row = rows["BestFit()"][int(shown[-2])]
for name, array in row.items():
    print(f"{name:10} {array.dtype!s:8} {array.shape}  {array[:6]} ... {array[-4:]}")
edges = np.flatnonzero(np.diff(row["segments"]))
print("documents or pieces:", row["segments"].max(), " padding:", int((row["segments"] == 0).sum()))
assert (row["positions"][edges + 1] == 0).all()  # a document begins, or padding does

# %% [markdown]
# ## What it costs and what it saves
#
# Over the length of rows: the share of documents that lie in more than one row though they would
# fit into one, the share of places that are padding, and the share of query-key pairs of a row that
# are of one document (what is left is masked; without a mask it is attention to other texts).


# %%
def torn_by_cutting(seq_len):
    begin_N, stop_N = store.offsets_N1[:-1], store.offsets_N1[1:]
    fits_N = length_N <= seq_len
    return (begin_N // seq_len != (stop_N - 1) // seq_len)[fits_N].mean()


def padding_of(lengths, seq_len):
    pieces = split_long(lengths, seq_len)
    return 1 - pieces.length_N.sum() / (len(best_fit(pieces.length_N, seq_len)) * seq_len)


def own_pairs(source):
    taken = source.take(range(0, len(source), max(1, len(source) // 100)))
    counts = [np.unique(s[s > 0], return_counts=True)[1] for s in taken["segments"]]
    return np.mean([(c.astype(float) ** 2).sum() / source.seq_len**2 for c in counts])


lengths = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
torn = [torn_by_cutting(n) for n in lengths]
padded = [padding_of(length_N, n) for n in lengths]
cut_pairs = [own_pairs(Cut(document_mask=True).rows(store, n, pad_id)) for n in lengths]
fit_pairs = [own_pairs(BestFit().rows(store, n, pad_id)) for n in lengths]

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.1), layout="constrained")
left.plot(lengths, 100 * np.array(torn), marker="o", color="C3")
left.set(title="Documents that fit, torn by cutting", ylabel="percent", ylim=(0, 100))
middle.plot(lengths, 100 * np.array(padded), marker="o", color="C0")
middle.set(title="Padding of best fit", ylabel="percent of places", ylim=(0, None))
right.plot(lengths, 100 * np.array(cut_pairs), marker="o", color="C3", label="cut, masked")
right.plot(lengths, 100 * np.array(fit_pairs), marker="o", color="C0", label="best fit")
right.set(title="Pairs within one document", ylabel="percent of pairs", ylim=(0, 100))
right.legend(frameon=False)
for axes in (left, middle, right):
    axes.set_xscale("log", base=2)
    axes.set_xlabel("length of rows")
plt.show()
pieces = split_long(length_N, T)
bins = best_fit(pieces.length_N, T)
assert max(pieces.length_N[members].sum() for members in bins) <= T
assert (np.sort(np.concatenate(bins)) == np.arange(len(pieces.length_N))).all()  # each once

# %% [markdown]
# ## Why the fullest bin that still holds it
#
# Taking pieces as they come and opening a new row when one does not fit (next fit) wastes much;
# sorting them first and choosing the tightest hole wastes little. How many documents are packed at
# a time matters too: a window that sees few of them has fewer pieces to fill holes with.


# %%
def next_fit_padding(lengths, seq_len):
    used, count = seq_len, 0
    for n in split_long(lengths, seq_len).length_N:
        if used + n > seq_len:
            used, count = 0, count + 1
        used += n
    return 1 - lengths.sum() / (count * seq_len)


def windowed_padding(window):
    parts = [length_N[i : i + window] for i in range(0, len(length_N), window)]
    sizes = [split_long(part, T).length_N for part in parts]
    return 1 - length_N.sum() / (sum(len(best_fit(size, T)) for size in sizes) * T)


windows = [4, 8, 16, 32, 64, 128, len(length_N)]
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(windows, [100 * windowed_padding(w) for w in windows], marker="o", label="best fit")
axes.axhline(100 * next_fit_padding(length_N, T), color="C1", linestyle="--", label="next fit")
axes.set(
    xscale="log", xlabel="documents packed at a time", ylabel="padding, percent", ylim=(0, None)
)
axes.set_title(f"Rows of {T:,}")
axes.legend(frameon=False)
plt.show()
assert windowed_padding(len(length_N)) < next_fit_padding(length_N, T)

# %% [markdown]
# Next: what it does to the loss, `python -m experiments.ablations packing --workdir runs/packing`.
