"""The routing of tokens, and their rows sent to their places, on Hopper in Pallas Mosaic GPU.

`route` reads the logits of 64 tokens into registers once and takes their maxima one after another.
`copy_rows` and `put_rows` read a token's row once and write it to all of its places: in expert
order it would be read A times, too far apart for the cache to keep it. Every row is written once:
no atomics, the same bits every time. Letters: M E A R D.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from glm45_jax.kernels import hopper
from glm45_jax.kernels.dispatch import device, not_hopper
from glm45_jax.kernels.hopper import HALF

THREADS = 128
CTAS = 128  # blocks of `route`, at most; they wait for each other
MOST_EXPERTS = 256  # 64 x 256 choices are 128 registers a thread
MOST_TOKENS = 1 << 18  # what a block counts is up to 2,048, which COUNT holds
COUNT = jnp.float16
BITS = 10  # of a total, in the lower of two numbers of COUNT
LOWEST = float(jnp.finfo(jnp.float32).min)  # of a choice; -inf is one that was taken
VECTOR = 16  # bytes that a thread reads at once
MOST_BYTES = 128 * 1024  # of rows that a block of `copy_rows` holds in shared memory


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Sizes that do not change what `copy_rows` and `put_rows` give. block: tokens of one block;
    at_once: rows of a token whose outputs `put_rows` reads before it writes the first.
    """

    block: int = 4
    at_once: int = 4


def refuses(logits_ME: jax.Array | jax.ShapeDtypeStruct, top_k: int, groups: int = 1) -> str | None:
    """Why `route` cannot run there, or None."""
    if why := not_hopper():
        return why
    M, E = logits_ME.shape
    if groups != 1:
        return f"experts come in {groups} groups, the kernel knows one"
    if E > MOST_EXPERTS:
        return f"{E} experts are more than {MOST_EXPERTS}"
    if M > MOST_TOKENS or M * top_k >= 1 << 24:
        return f"{M} tokens are more than {MOST_TOKENS}, or their rows than 2**24"
    if top_k > E:
        return f"top_k {top_k} is above {E} experts"
    cores = getattr(device(), "core_count", CTAS)
    if 2 * cores < CTAS:
        return f"{cores} multiprocessors, {CTAS} blocks must run at once, two on each"
    return None


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Of one call: M tokens in tiles of HALF, `each` tiles a block; E experts, padded to `wide`."""

    M: int
    E: int
    A: int
    most: int
    interpret: bool

    @property
    def each(self) -> int:
        return pl.cdiv(pl.cdiv(self.M, HALF), self.most)

    @property
    def atom(self) -> int:
        """Columns of a swizzle atom of COUNT."""
        return 64 if self.wide % 64 == 0 else 32

    @property
    def blocks(self) -> int:
        """A multiple of 8, as TMA takes rows of counts; the last may have no token."""
        blocks = pl.cdiv(pl.cdiv(self.M, HALF), self.each)
        return blocks if self.interpret else pl.cdiv(blocks, 8) * 8

    @property
    def rows(self) -> int:
        return self.blocks * self.each * HALF

    @property
    def wide(self) -> int:
        return pl.cdiv(self.E, 32) * 32

    def tiles(self, body, start):
        """Folds body(first token, carry) over the tiles of this block."""
        first = lax.axis_index("block") * self.each * HALF
        if self.each == 1:
            return body(first, start)
        return _each(self.each, lambda i, carry: body(first + i * HALF, carry), start)


@functools.partial(jax.jit, static_argnames=("top_k", "norm_topk", "scale", "most", "interpret"))
def route(
    logits_ME: jax.Array,
    bias_E: jax.Array,
    *,
    top_k: int,
    norm_topk: bool,
    scale: float,
    most: int = CTAS,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """expert[M, A], gate[M, A], order[R], place[M, A] and rows[E] of `routing.Routing`, in one
    kernel. Equal scores go to the lower expert, NaN first, as by `lax.top_k`; but zeros of both
    signs are equal here, and so are NaN and infinity.

    Blocks, at most `most`, choose for their tokens, count, wait for each other, and place their
    rows by all counts. All must find a place before any goes on, two fit a multiprocessor: a
    collective beside them leaves enough. Of two such kernels at once one must be started whole
    before the other, as one process does it.
    The interpreter knows no such wait: it gets both halves as two kernels, whose border is one.
    """
    M, E = logits_ME.shape
    s = _Sizes(M, E, top_k, most, interpret)
    logits_ME = jnp.pad(logits_ME.astype(jnp.float32), ((0, s.rows - s.M), (0, s.wide - s.E)))
    bias_E = jnp.pad(bias_E.astype(jnp.float32), (0, s.wide - s.E))
    triangle = np.tril(np.ones((HALF, HALF), COUNT), -1)
    of = jax.ShapeDtypeStruct
    chosen = of((s.rows, s.A), jnp.int32), of((s.rows, s.A), jnp.float32)
    counts = of((s.blocks, 8, s.wide), COUNT)  # each row eight times: TMA writes tiles of eight
    total = of((HALF, s.wide), jnp.int32)
    placed = of((s.M * s.A,), jnp.int32), of((s.rows, s.A), jnp.int32), total

    def both(logits, bias, triangle, expert, gate, counts, order, spot, total, mem):
        first(logits, bias, expert, gate, counts, mem)
        met = pl.get_global(plgpu.SemaphoreType.REGULAR)
        plgpu.semaphore_signal(met, memory_scope="gpu")
        plgpu.semaphore_wait(met, s.blocks, decrement=False, memory_scope="gpu")
        second(triangle, expert, counts, order, spot, total, mem)

    def first(logits, bias, expert, gate, counts, mem):
        _tell(_choose(s, norm_topk, scale, logits, bias, expert, gate, mem), counts, mem)

    def second(triangle, expert, counts, order, spot, total, mem):
        _place(s, _told(s, counts, mem), triangle, expert, order, spot, total, mem)

    def kernel(body, *out):
        return plgpu.kernel(
            body,
            out_type=out,
            scratch_types=[_scratch(s)],
            grid=(s.blocks,),
            grid_names=("block",),
            interpret=plgpu.InterpretGPUParams() if interpret else None,
        )

    args = logits_ME, bias_E
    if interpret:
        expert, gate, counts = kernel(first, *chosen, counts)(*args)
        order, spot, total = kernel(second, *placed)(triangle, expert, counts)
    else:
        out = kernel(both, *chosen, counts, *placed)(*args, triangle)
        expert, gate, _, order, spot, total = out
    return expert[: s.M], gate[: s.M], order, spot[: s.M], total[0, : s.E]


def _scratch(s: _Sizes) -> dict[str, Any]:
    tiled = hopper.tiling(8, COUNT, s.atom * jnp.dtype(COUNT).itemsize)
    score = plgpu.SMEM((HALF, s.wide), jnp.float32, **hopper.tiling(8, jnp.float32))
    counts = plgpu.SMEM((pl.cdiv(s.blocks, HALF) * HALF, s.wide), COUNT, **tiled)
    return {
        # Where one was the other comes: two blocks of 256 experts fit a multiprocessor.
        "shared": [score, counts] if s.interpret else plgpu.RefUnion(score, counts),
        "hit": plgpu.SMEM((HALF, s.wide), COUNT, **tiled),
        "triangle": plgpu.SMEM((HALF, HALF), COUNT, **tiled),
        "loaded": plgpu.Barrier(num_barriers=2),
        "words": plgpu.SMEM((s.A, HALF), jnp.int32),  # experts, then places
        "gates": plgpu.SMEM((s.A, HALF), jnp.float32),
    }


def _each(n: int, body, start=None):
    """Folds body(i, carry) over n. Loops stay loops here: written out, `route` is more code than
    the cache of instructions holds, and waits for it.
    """
    return lax.fori_loop(jnp.int32(0), jnp.int32(n), body, start)


def _choose(s: _Sizes, norm_topk, scale, logits_ref, bias_ref, expert_ref, gate_ref, mem):
    """The best experts of each token of the block, their gates; how many tokens chose each, the
    same in all of 64 rows.
    """
    row, column = (hopper.index((HALF, s.wide), axis) for axis in (0, 1))
    ones = hopper.filled((HALF, HALF), 1.0, plgpu.Layout.WGMMA).astype(COUNT)
    scored = mem["shared"][0]

    def tile(first, count):
        tokens = pl.ds(first, HALF)
        logits = plgpu.load(logits_ref.at[tokens], layout=plgpu.Layout.WGMMA, optimized=False)
        bias = plgpu.load(bias_ref, layout=hopper.COLUMN, optimized=False)
        score = 1 / (1 + jnp.exp(-logits))
        scored[...] = score  # registers do not hold it beside the choices
        value = score + hopper.down(bias, HALF)
        value = jnp.where(value != value, jnp.inf, jnp.maximum(value, LOWEST))
        value = jnp.where(column < s.E, value, -jnp.inf)  # no expert: as if taken

        def choose(a, value):
            equal = value == hopper.across(value.max(axis=1), s.wide)
            found = jnp.where(equal, column, s.wide).min(axis=1)
            expert_ref.at[tokens, a][...] = found
            mem["words"].at[a][...] = found
            return jnp.where(column == hopper.across(found, s.wide), -jnp.inf, value)

        value = _each(s.A, choose, value)
        hit = (value == -jnp.inf) & (column < s.E) & (row + first < s.M)
        mem["hit"][...] = jnp.where(hit, 1.0, 0.0).astype(COUNT)
        plgpu.commit_smem()
        score = plgpu.load(scored, layout=plgpu.Layout.WGMMA)

        def weigh(a, total):
            gate = jnp.where(_chosen(mem, a, column), score, 0.0).sum(axis=1)
            mem["gates"].at[a][...] = gate
            return total + gate

        total = _each(s.A, weigh, hopper.filled((HALF,), 1e-20, hopper.ROW))

        def norm(a, _):
            gate = plgpu.load(mem["gates"].at[a], layout=hopper.ROW)
            gate_ref.at[tokens, a][...] = (gate / total if norm_topk else gate) * scale

        _each(s.A, norm)
        more = hopper.product(ones, mem["hit"], s.interpret)
        return more if count is None else count + more

    zeros = hopper.filled((HALF, s.wide), 0.0, plgpu.Layout.WGMMA)
    return s.tiles(tile, None if s.each == 1 else zeros)


def _tell(count, counts_ref, mem):
    """Writes what a block has counted."""
    counts = mem["shared"][1]
    counts.at[:HALF][...] = count.astype(COUNT)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(counts.at[:8], counts_ref.at[lax.axis_index("block")])
    plgpu.wait_smem_to_gmem(0)


def _told(s: _Sizes, counts_ref, mem):
    """A function to the counts of the blocks before one, None for all, summed, the same in all of
    64 rows.
    """
    counts, wide = mem["shared"][1], pl.cdiv(s.blocks, s.atom) * s.atom
    if s.blocks < wide:  # products are over whole atoms
        last = counts.at[counts.shape[0] - HALF :]
        last[...] = hopper.filled((HALF, s.wide), 0.0, plgpu.Layout.WGMMA).astype(COUNT)
    plgpu.commit_smem()
    plgpu.copy_gmem_to_smem(counts_ref.at[:, 0], counts.at[: s.blocks], mem["loaded"].at[0])
    plgpu.barrier_wait(mem["loaded"].at[0])
    which = hopper.index((HALF, wide), 1)

    def before(block):
        some = hopper.filled((HALF, wide), 1.0, plgpu.Layout.WGMMA)
        if block is not None:
            some = jnp.where(which < block, some, 0.0)
        return hopper.product(some.astype(COUNT), counts.at[:wide], s.interpret)

    return before


def _place(s: _Sizes, before, triangle_ref, expert_ref, order_ref, place_ref, total_ref, mem):
    """The places of the block's rows. The first of each expert is a sum over all counts, that of a
    token after it one over the tile: products with triangles of ones.
    """
    total, block = before(None), lax.axis_index("block")
    plgpu.copy_gmem_to_smem(triangle_ref, mem["triangle"], mem["loaded"].at[1])
    row, column = (hopper.index((HALF, s.wide), axis) for axis in (0, 1))

    @pl.when(block == 0)
    def _():
        total_ref[...] = total.astype(jnp.int32)

    plgpu.barrier_wait(mem["loaded"].at[1])
    start = _sums_before(total, mem["triangle"], s.interpret)

    def tile(first, base):
        tokens = pl.ds(first, HALF)

        def hits(a, hit):
            expert = plgpu.load(expert_ref.at[tokens, a], layout=hopper.ROW, optimized=False)
            mem["words"].at[a][...] = expert
            return jnp.where(_chosen(mem, a, column), 1.0, hit)

        if s.each > 1 or s.interpret:  # else the choice left them there
            zeros = hopper.filled((HALF, s.wide), 0.0, plgpu.Layout.WGMMA)
            hit = jnp.where(row + first < s.M, _each(s.A, hits, zeros), 0.0)
            mem["hit"][...] = hit.astype(COUNT)
            plgpu.commit_smem()
        spot = base + hopper.product(mem["triangle"], mem["hit"], s.interpret)

        def places(a, _):
            place = jnp.where(_chosen(mem, a, column), spot, 0.0).sum(axis=1).astype(jnp.int32)
            place_ref.at[tokens, a][...] = place
            mem["words"].at[a][...] = place

        _each(s.A, places)
        _invert(s, first, mem["words"], order_ref)
        if s.each == 1:
            return base
        ones = hopper.filled((HALF, HALF), 1.0, plgpu.Layout.WGMMA).astype(COUNT)
        return base + hopper.product(ones, mem["hit"], s.interpret)

    s.tiles(tile, start + before(block))


def _sums_before(total, triangle, interpret):
    """Of each column the sum of those before it, all rows alike: float32 up to 2**24, each column
    one of up to 2**20, in two numbers of COUNT.
    """
    parts, wide = [], total.shape[1]
    for k in range(0, wide, HALF):
        width = min(HALF, wide - k)
        some = total[:, k : k + width]
        high = (some.astype(jnp.int32) >> BITS).astype(jnp.float32)
        low = some - high * 2**BITS
        upper = triangle.at[:width, :width].transpose((1, 0))
        part = hopper.product(high.astype(COUNT), upper, interpret) * 2**BITS
        part += hopper.product(low.astype(COUNT), upper, interpret)
        parts.append(part + hopper.across(total[:, :k].sum(axis=1), width) if k else part)
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _chosen(mem, a, column):
    """Where a token's expert of rank a is."""
    expert = plgpu.load(mem["words"].at[a], layout=hopper.ROW)
    return column == hopper.across(expert, column.shape[1])


def _invert(s: _Sizes, first, place, order_ref):
    """order[place[a, t]] = the row's index, word by word."""

    def token(t, _):
        spots = [place[a, t] for a in range(s.A)]
        for a, spot in enumerate(spots):
            order_ref[spot] = (first + t) * s.A + a

    plgpu.commit_smem()
    lax.fori_loop(jnp.int32(0), jnp.minimum(HALF, s.M - first), token, None)


def refuses_places(x_MD: jax.Array | jax.ShapeDtypeStruct) -> str | None:
    """Why `copy_rows` and `put_rows` cannot run there, or None."""
    if why := not_hopper():
        return why
    D = x_MD.shape[1]
    return f"rows of {D} are not a multiple of {THREADS}" if D % THREADS else None


def copy_rows(
    x_MD: jax.Array,
    place_MA: jax.Array,
    *,
    tokens: Tokens | None = None,
    interpret: bool = False,
) -> jax.Array:
    """out_RD[place_MA[m, a]] = x_MD[m], R = M * A, by copies of whole rows that pass no register.

    place_MA: int32, a permutation of 0 to R - 1. D a multiple of THREADS. Bytes: M rows read, R
    written.
    """
    (M, D), A = x_MD.shape, place_MA.shape[1]
    fit = max(1, MOST_BYTES // (D * x_MD.dtype.itemsize))
    block = min((tokens or Tokens()).block, M, fit)

    def kernel(x_ref, place_ref, out_ref, rows_ref, loaded):
        # The last block ends at M: its first tokens are written twice, alike.
        first = jnp.minimum(lax.axis_index("block") * block, M - block)
        inside = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # else by tiles, of at most 256 columns
        plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(first, block)], rows_ref, loaded, oob_mode=inside)
        places = [place_ref[first * A + i] for i in range(block * A)]
        plgpu.barrier_wait(loaded)
        for i, place in enumerate(places):
            row = rows_ref.at[pl.ds(i // A, 1)]
            plgpu.copy_smem_to_gmem(row, out_ref.at[pl.ds(place, 1)], commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M * A, D), x_MD.dtype),
        scratch_types=[plgpu.SMEM((block, D), x_MD.dtype), plgpu.Barrier()],
        grid=(pl.cdiv(M, block),),
        grid_names=("block",),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return run(x_MD, place_MA.astype(jnp.int32).reshape(-1))


def put_rows(
    x_MD: jax.Array,
    place_MA: jax.Array,
    scale_MA: jax.Array | None = None,
    y_RD: jax.Array | None = None,
    *,
    dtype: jnp.dtype | None = None,
    tokens: Tokens | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """(out_RD, dot_MA): out_RD[place_MA[m, a]] = scale_MA[m, a] * x_MD[m] in `dtype` (of x), and
    dot_MA[m, a] = <x_MD[m], y_RD[place_MA[m, a]]>, float32; None without `y_RD`.

    place_MA: int32, a permutation of 0 to R - 1, R = M * A. Without `scale_MA` rows are copied.
    Products and sums in float32. D a multiple of THREADS. Bytes: M rows of x read, R of out
    written, R of y read.
    """
    (M, D), A, sizes = x_MD.shape, place_MA.shape[1], tokens or Tokens()
    block, dtype = min(sizes.block, M), jnp.dtype(dtype or x_MD.dtype)
    layout = _layout(D, x_MD.dtype, dtype, x_MD.dtype if y_RD is None else y_RD.dtype)

    def load(ref, row):
        return plgpu.load(ref.at[row], layout=layout, optimized=False)

    def one(m, x_ref, place_ref, scale_ref, y_ref, out_ref, dot_ref):
        place_A = [place_ref[m * A + a] for a in range(A)]
        scale_A = [None if scale_ref is None else scale_ref[m * A + a] for a in range(A)]
        x_D = load(x_ref, m)
        wide_D = x_D if scale_ref is None and y_ref is None else x_D.astype(jnp.float32)
        for first in range(0, A, sizes.at_once):
            some = range(first, min(first + sizes.at_once, A))
            y_aD = [] if y_ref is None else [load(y_ref, place_A[a]) for a in some]
            for a in some:
                row_D = x_D if scale_A[a] is None else wide_D * scale_A[a]
                out_ref.at[place_A[a]][...] = row_D.astype(dtype)
            for a, y_D in zip(some, y_aD, strict=False):
                dot_ref[m * A + a] = (wide_D * y_D.astype(jnp.float32)).sum()

    def kernel(*refs):
        # The last block ends at M: its first tokens are written twice, alike.
        first = jnp.minimum(lax.axis_index("block") * block, M - block)
        lax.fori_loop(0, block, lambda i, _: one(first + i, *refs), None)

    out = jax.ShapeDtypeStruct((M * A, D), dtype)
    dot = None if y_RD is None else jax.ShapeDtypeStruct((M * A,), jnp.float32)
    run = plgpu.kernel(
        kernel,
        out_type=(out, dot),
        grid=(pl.cdiv(M, block),),
        grid_names=("block",),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    scale_R = None if scale_MA is None else scale_MA.astype(jnp.float32).reshape(-1)
    out_RD, dot_R = run(x_MD, place_MA.astype(jnp.int32).reshape(-1), scale_R, y_RD)
    return out_RD, None if dot_R is None else dot_R.reshape(M, A)


def _layout(D: int, *dtypes: jnp.dtype) -> Any:
    """A row over the threads of a warpgroup, in the widest pieces that a thread reads at once."""
    vector = VECTOR // max(jnp.dtype(dtype).itemsize for dtype in dtypes)
    return plgpu.Layout.WG_STRIDED((D,), vec_size=math.gcd(vector, D // THREADS))
