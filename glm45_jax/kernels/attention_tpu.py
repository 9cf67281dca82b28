"""Causal grouped-query attention for TPU in Pallas: forward and backward. Compiled for v5p and v6e,
run only by the interpreter: nothing here has been timed.

A step of the grid is one pair of a query tile and a key tile. `pairs` lists those with anything to
see, so tiles after the diagonal or of other documents are neither fetched nor stepped over, and the
list of a packed row is as short as its documents make it. Query heads of a group lie one under the
other in a tile and share its keys. Every sum has one order: bitwise repeatable.
Letters: B T N K G H U; P pairs; inside a kernel `_r` are the rows of a tile (heads x queries), `_s`
its keys, `_l` 128 lanes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from glm45_jax.kernels.attention_tiles import begins

LANES = 128
LOWEST = -1e30  # finite: a row whose first tile is all masked has no NaN, and forgets that tile
LOG2_E = math.log2(math.e)
# What an entry of the list says beside its tiles: first and last pair of its queries, whether some
# of it is masked, and whether it is a pair at all.
FIRST, LAST, EDGE, LIVE = 1, 2, 4, 8
KEY_SHIFT, QUERY_SHIFT = 4, 16
MOST_PAIRS = 1 << 17  # int32 in SMEM, which has 1 MiB


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes that do not change the result (but its rounding) but its speed. UNVERIFIED on a TPU:
    chosen by counting, and by the compiler's schedule (LIBTPU_INIT_ARGS="--xla_jf_dump_to=FOLDER
    --xla_jf_dump_llo_text=true"). There an unmasked forward pair of 2,048 x 512 at H 128 has 4,072
    bundles on v5p, whose matrix units would take 4,096 cycles, and 2,598 on v6e, where tiles of
    1,024 rows have 2,980 for as many scores; stalls are not in it.

    queries, keys: of a tile. A step of the forward pass has 4 x H FLOPs a score and about 9 vector
    operations; v5p does 16 of them in the time of 512 FLOPs, so both units are busy. Fetched are
    4 x H bytes a key for `rows` x 4 x H FLOPs: 1,024 FLOPs a byte at 1,024 rows; v5p has 166 in
    balance, v6e 560. rows: most of a tile, heads x queries: scores of 2,048 x 512 are 4 MiB.
    chunk: keys whose gradients stay in VMEM while all queries pass, at H + U = 256: 8 MiB in
    float32, 8 MiB more as they are written; longer rows go by chunks.
    vmem: of the 64 MiB that a core of v5p has (v6e: 128); at H 128 the compiler needs 8 to 12 for
    the forward pass, up to 24 for the backward pass.
    """

    queries: int = 512
    keys: int = 512
    rows: int = 2048
    rows_back: int = 1024
    chunk: int = 8192
    vmem: int = 40 * 2**20
    interpret: bool = False


def flash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKU: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    tuning: Tuning | None = None,
) -> jax.Array:
    """Attention output [B, T, N, U] in bfloat16; scores scaled by H^-0.5; softmax in float32.

    segments_BT: the document of each position; equal numbers that do not touch are two documents.
    None for one document a row. Differentiable in q, k, v. Any T: rows are padded to whole tiles.
    """
    tuning = tuning or Tuning()
    T = q_BTNH.shape[1]
    more = padded(T, tuning) - T  # added last, where causal queries do not look
    q_BNTH, k_BKTH, v_BKTU = (
        jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))).swapaxes(1, 2)
        for x in (q_BTNH, k_BTKH, v_BTKU)
    )
    begin_B1T = None
    if segments_BT is not None:
        segments_BT = jnp.pad(segments_BT, ((0, 0), (0, more)), constant_values=-1)
        begin_B1T = begins(segments_BT)[:, None]
    return _flash(q_BNTH, k_BKTH, v_BKTU, begin_B1T, tuning).swapaxes(1, 2)[:, :T]


def padded(T: int, tuning: Tuning) -> int:
    """T in whole tiles of queries, and of keys."""
    wide = _lanes(T)
    return wide if wide <= tuning.queries else -(-T // tuning.queries) * tuning.queries


def refuses(
    q_BTNH: jax.Array | jax.ShapeDtypeStruct,
    k_BTKH: jax.Array | jax.ShapeDtypeStruct,
    v_BTKU: jax.Array | jax.ShapeDtypeStruct,
    *,
    rows: int,
    tuning: Tuning | None = None,
) -> str | None:
    """Why the kernels cannot take these arguments, or None. rows: of them that a device holds."""
    dtypes = [str(x.dtype) for x in (q_BTNH, k_BTKH, v_BTKU)]
    if set(dtypes) != {"bfloat16"}:
        return f"mosaic_tpu takes bfloat16, not {dtypes}"
    widths = (q_BTNH.shape[-1], v_BTKU.shape[-1])
    if not {*widths} <= {64, 128, 192, 256}:
        return f"mosaic_tpu takes heads 64, 128, 192 or 256 wide, not keys and values {widths}"
    tuning = tuning or Tuning()
    T = q_BTNH.shape[1]
    tiles = _Tiles.of(padded(T, tuning), tuning)
    if (most := rows * pairs(tiles, None)[0].shape[-1]) > MOST_PAIRS:
        return (
            f"mosaic_tpu lists up to {MOST_PAIRS} pairs of tiles, not the {most} of {rows} rows of "
            f"{T} a device; give a device fewer rows at once"
        )
    return None


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Tiles of a row of T: `queries` and `keys` each."""

    T: int
    queries: int
    keys: int

    @classmethod
    def of(cls, T: int, tuning: Tuning) -> _Tiles:
        """Of a row that is `padded`."""
        queries = min(T, tuning.queries)
        return cls(T, queries, tuning.keys if T % tuning.keys == 0 else queries)


def pairs(tiles: _Tiles, begin_B1T: jax.Array | None, per: int | None = None):
    """The pairs with anything to see, int32 [C, B or 1, P], and the most that a row has, [C].

    Queries rise slowest. per: tiles of keys of a chunk, whose pairs make a list of their own. A row
    with fewer pairs than P ends in entries that repeat its last one, not LIVE: nothing new is
    fetched for them.
    """
    xp = np if begin_B1T is None else jnp
    per = per or tiles.T // tiles.keys
    i_Z = np.arange(tiles.T // tiles.queries, dtype=np.int32)
    # int32 [C, B or 1, Z]: of each query tile, its first and last key tile of a chunk.
    low_C11 = np.arange(0, tiles.T // tiles.keys, per, dtype=np.int32)[:, None, None]
    last_C1Z = np.minimum(((i_Z + 1) * tiles.queries - 1) // tiles.keys, low_C11 + (per - 1))
    begin_1BT = np.zeros((1, 1, tiles.T), np.int32) if begin_B1T is None else begin_B1T[None, :, 0]
    first_CBZ = xp.maximum(begin_1BT[:, :, i_Z * tiles.queries] // tiles.keys, low_C11)
    cut_1BZ = begin_1BT[:, :, i_Z * tiles.queries + (tiles.queries - 1)]
    most = int(np.maximum(last_C1Z + 1 - low_C11, 0).sum(axis=-1).max())
    after_CBZ = xp.cumsum(xp.maximum(last_C1Z + 1 - first_CBZ, 0), axis=-1, dtype=np.int32)
    count_CB1 = after_CBZ[:, :, -1:]
    at_1P = np.arange(most, dtype=np.int32)[None]
    p_CBP = xp.minimum(at_1P[None], count_CB1 - 1)
    i_CBP = (p_CBP[..., None] >= after_CBZ[:, :, None, :]).sum(axis=-1, dtype=np.int32)

    def of(x_CBZ):
        return xp.take_along_axis(xp.broadcast_to(x_CBZ, after_CBZ.shape), i_CBP, axis=-1)

    j_CBP = of(last_C1Z) - (of(after_CBZ) - 1 - p_CBP)
    edge = (j_CBP + 1) * tiles.keys - 1 > i_CBP * tiles.queries  # crosses the diagonal
    edge = edge | (of(cut_1BZ) > j_CBP * tiles.keys)  # or a document begins inside
    flags = (FIRST, j_CBP == of(first_CBZ)), (LAST, j_CBP == of(last_C1Z)), (EDGE, edge)
    code_CBP = (i_CBP << QUERY_SHIFT) | (j_CBP << KEY_SHIFT) | LIVE
    for flag, where in flags:
        code_CBP = code_CBP | xp.where(where, np.int32(flag), np.int32(0))
    code_CBP = xp.where(
        at_1P[None] < count_CB1, code_CBP, code_CBP & np.int32(~(FIRST | LAST | LIVE))
    )
    return code_CBP, count_CB1.max(axis=(1, 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q_BNTH, k_BKTH, v_BKTU, begin_B1T, tuning):
    return _forward(q_BNTH, k_BKTH, v_BKTU, begin_B1T, tuning)[0]


def _flash_fwd(q_BNTH, k_BKTH, v_BKTU, begin_B1T, tuning):
    out_BNTU, lse_BN1T = _forward(q_BNTH, k_BKTH, v_BKTU, begin_B1T, tuning)
    return out_BNTU, (q_BNTH, k_BKTH, v_BKTU, begin_B1T, out_BNTU, lse_BN1T)


def _flash_bwd(tuning, kept, dout_BNTU):
    q_BNTH, k_BKTH, v_BKTU, begin_B1T, out_BNTU, lse_BN1T = kept
    delta_BN1T = jnp.einsum(
        "bntu,bntu->bnt", out_BNTU, dout_BNTU, preferred_element_type=jnp.float32
    )[:, :, None]
    arrays = (q_BNTH, k_BKTH, v_BKTU, dout_BNTU, lse_BN1T, delta_BN1T)
    return *_backward(arrays, begin_B1T, tuning), None


_flash.defvjp(_flash_fwd, _flash_bwd)


def _forward(q_BNTH, k_BKTH, v_BKTU, begin_B1T, tuning):
    """Output and base-2 log-sum-exp float32 [B, N, 1, T]. Key s is seen by queries s <= t < end[s]:
    where the document of each key ends lies along the lanes, as keys do here.
    """
    B, N, T, H = q_BNTH.shape
    K, U = v_BKTU.shape[1], v_BKTU.shape[3]
    tiles = _Tiles.of(T, tuning)
    heads = _heads(N // K, tiles.queries, tuning.rows)
    blocks = _Blocks(tiles, K, N // K // heads, heads)
    rows, scale = heads * tiles.queries, LOG2_E / math.sqrt(H)

    def kernel(code_ref, q_ref, k_ref, v_ref, *refs):
        end_ref, (out_ref, lse_ref, top_ref, total_ref, acc_ref) = refs[:-5], refs[-5:]
        code = _entry(code_ref, lax.div(pl.program_id(0), K), pl.program_id(2))

        @pl.when(_has(code, FIRST))
        def _():
            top_ref[...] = jnp.full_like(top_ref, LOWEST)
            total_ref[...] = jnp.zeros_like(total_ref)
            acc_ref[...] = jnp.zeros_like(acc_ref)

        def step(masked):
            score_rs = _dot(q_ref[0].reshape(rows, H), k_ref[0, 0], (1, 1))
            if masked:
                after, within = _places(code, tiles)
                row_rs = lax.broadcasted_iota(jnp.int32, (heads, tiles.queries, tiles.keys), 1)
                row_rs = row_rs.reshape(rows, tiles.keys) + (after - within)
                seen_rs = lax.broadcasted_iota(jnp.int32, row_rs.shape, 1) <= row_rs
                if end_ref:
                    seen_rs &= row_rs < end_ref[0][0] - within
                score_rs = jnp.where(seen_rs, score_rs, LOWEST)
            top_rl = jnp.maximum(top_ref[...], score_rs.max(axis=1, keepdims=True))
            p_rs = jnp.exp2((score_rs - _across(top_rl, tiles.keys)) * scale)
            kept_rl = jnp.exp2((top_ref[...] - top_rl) * scale)
            parts = [p_rs[:, i : i + LANES] for i in range(0, tiles.keys, LANES)]
            total_ref[...] = total_ref[...] * kept_rl + sum(parts[1:], parts[0])
            mixed_rU = _dot(p_rs.astype(v_BKTU.dtype), v_ref[0, 0], (1, 0))
            acc_ref[...] = acc_ref[...] * _across(kept_rl, U) + mixed_rU
            top_ref[...] = top_rl

        _masked_or_not(code, step)

        @pl.when(_has(code, LAST))
        def _():
            total_r1 = total_ref[...].sum(axis=1, keepdims=True)
            out_rU = (acc_ref[...] / total_r1).astype(out_ref.dtype)
            out_ref[0] = out_rU.reshape(heads, tiles.queries, U)
            for n, begin in itertools.product(range(heads), range(0, tiles.queries, LANES)):
                at = slice(n * tiles.queries + begin, n * tiles.queries + begin + LANES)
                total_1l, top_1l = _along(total_r1[at]), _along(top_ref[at])
                lse_ref[0, n, :, begin : begin + LANES] = top_1l * scale + jnp.log2(total_1l)

    in_specs = [blocks.queries(H), blocks.keys(H), blocks.keys(U)]
    args = [q_BNTH, k_BKTH, v_BKTU]
    if begin_B1T is not None:
        in_specs.append(blocks.key_row())
        args.append(_ends(begin_B1T))
    out = (
        jax.ShapeDtypeStruct((B, N, T, U), q_BNTH.dtype),
        jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
    )
    out_specs = (blocks.queries(U), blocks.query_rows())
    scratch = [(rows, width) for width in (LANES, LANES, U)]
    code_1BP, (count,) = pairs(tiles, begin_B1T)
    told = (code_1BP[0], count)
    sizes = (out, blocks, args, in_specs, out_specs, scratch, told, tuning)
    return _call(kernel, "attention", *sizes, groups=pltpu.PARALLEL)


def _backward(arrays, begin_B1T, tuning):
    """dq, dk, dv, each in the dtype of its array: five products a pair.

    A step makes the scores once and serves all three, keys as rows, so that what belongs to a query
    lies along the lanes. dk and dv of `chunk` keys stay in VMEM while the queries of all heads of
    the group pass; a query tile meets its keys one after the other, so dq leaves when it is done.
    More chunks add to dq in HBM, in float32: 8 x H bytes a query and chunk.
    """
    q_BNTH, k_BKTH, v_BKTU = arrays[:3]
    T = q_BNTH.shape[2]
    tiles = _Tiles.of(T, tuning)
    wide = _lanes(k_BKTH.shape[3]) + _lanes(v_BKTU.shape[3])
    chunk = max(tiles.keys, tuning.chunk * 2 * LANES // wide // tiles.keys * tiles.keys)
    if chunk >= T:
        code_1BP, (count,) = pairs(tiles, begin_B1T)
        return _chunk(arrays, begin_B1T, None, (code_1BP[0], count, 0), T, tuning)
    lists = pairs(tiles, begin_B1T, chunk // tiles.keys)
    told = (*map(jnp.asarray, lists), jnp.arange(0, T // tiles.keys, chunk // tiles.keys))

    def one(dq_BNTH, told):
        dq_BNTH, *moved = _chunk(arrays, begin_B1T, dq_BNTH, told, chunk, tuning)
        return dq_BNTH, moved

    dq_BNTH, moved = lax.scan(one, jnp.zeros(q_BNTH.shape, jnp.float32), told)
    dk_BKTH, dv_BKTU = (
        jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, x.shape[-1])[:, :, :T] for x in moved
    )
    return dq_BNTH.astype(q_BNTH.dtype), dk_BKTH, dv_BKTU


def _chunk(arrays, begin_B1T, before_BNTH, told, chunk, tuning):
    """dq, and dk and dv [B, K, chunk, .] of the keys from tile `low` on. before: dq of the chunks
    so far, which this one is added to, float32; None where there is one chunk.
    """
    q_BNTH, k_BKTH, v_BKTU = arrays[:3]
    (B, N, T, H), K, U = q_BNTH.shape, v_BKTU.shape[1], v_BKTU.shape[3]
    tiles = _Tiles.of(T, tuning)
    heads = _heads(N // K, tiles.queries, tuning.rows_back)
    blocks = _Blocks(tiles, K, N // K // heads, heads)
    rows, scale = heads * tiles.queries, 1 / math.sqrt(H)
    add, packed = before_BNTH is not None, begin_B1T is not None

    def kernel(code_ref, low_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs):
        begin_ref, before_ref = refs[0], refs[int(packed)]  # where they are given
        dq_ref, dk_ref, dv_ref, dq_acc, dk_acc, dv_acc = refs[-6:]
        group, p = pl.program_id(1), pl.program_id(2)
        code = _entry(code_ref, lax.div(pl.program_id(0), K), p)

        @pl.when((group == 0) & (p == 0))
        def _():
            dk_acc[...] = jnp.zeros_like(dk_acc)
            dv_acc[...] = jnp.zeros_like(dv_acc)

        @pl.when(_has(code, FIRST))
        def _():
            dq_acc[...] = jnp.zeros_like(dq_acc)

        def lanes(ref):
            return _beside([ref[0, n] for n in range(heads)])

        def step(masked):
            q_rH, dout_rU = q_ref[0].reshape(rows, H), dout_ref[0].reshape(rows, U)
            k_sH, v_sU = k_ref[0, 0], v_ref[0, 0]
            after, within = _places(code, tiles)
            score_sr = _dot(k_sH, q_rH, (1, 1))
            if masked:
                row_1t = lax.broadcasted_iota(jnp.int32, (1, tiles.queries), 1) + (after - within)
                key_sr = lax.broadcasted_iota(jnp.int32, score_sr.shape, 0)
                seen_sr = key_sr <= _beside([row_1t] * heads)
                if packed:
                    seen_sr &= key_sr >= _beside([begin_ref[0] - within] * heads)
                score_sr = jnp.where(seen_sr, score_sr, LOWEST)
            p_sr = jnp.exp2(score_sr * (scale * LOG2_E) - lanes(lse_ref))
            dp_sr = _dot(v_sU, dout_rU, (1, 1))
            ds_sr = (p_sr * (dp_sr - lanes(delta_ref))).astype(q_rH.dtype)
            at = pl.ds(pl.multiple_of(within - low_ref[0] * tiles.keys, tiles.keys), tiles.keys)
            dv_acc[at] += _dot(p_sr.astype(q_rH.dtype), dout_rU, (1, 0))
            dk_acc[at] += _dot(ds_sr, q_rH, (1, 0))
            dq_acc[...] += _dot(ds_sr, k_sH, (0, 0))

        _masked_or_not(code, step)

        @pl.when(_has(code, LAST))
        def _():
            dq = (dq_acc[...] * scale).reshape(heads, tiles.queries, H)
            dq_ref[0] = (before_ref[0] + dq if add else dq).astype(dq_ref.dtype)

        @pl.when((group == pl.num_programs(1) - 1) & (p == pl.num_programs(2) - 1))
        def _():
            dk_ref[0, 0] = (dk_acc[...] * scale).astype(dk_ref.dtype)
            dv_ref[0, 0] = dv_acc[...].astype(dv_ref.dtype)

    wide, narrow = blocks.queries(H), blocks.query_rows()
    in_specs = [wide, blocks.keys(H), blocks.keys(U), blocks.queries(U), narrow, narrow]
    args = list(arrays)
    if packed:
        in_specs.append(blocks.query_row())
        args.append(begin_B1T)
    if add:
        in_specs.append(wide)
        args.append(before_BNTH)
    out = (
        jax.ShapeDtypeStruct((B, N, T, H), jnp.float32 if add else q_BNTH.dtype),
        jax.ShapeDtypeStruct((B, K, chunk, H), k_BKTH.dtype),
        jax.ShapeDtypeStruct((B, K, chunk, U), v_BKTU.dtype),
    )
    out_specs = (wide, blocks.chunk(chunk, H), blocks.chunk(chunk, U))
    scratch = [(rows, H), (chunk, H), (chunk, U)]
    sizes = (out, blocks, args, in_specs, out_specs, scratch, told, tuning)
    # Behind the scalars, the last argument.
    aliases = {len(told) - 1 + len(args) - 1: 0} if add else {}
    return _call(kernel, "attention_back", *sizes, input_output_aliases=aliases)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """What a step of the grid (B x kv_heads, groups, P) works on: `heads` query heads of a kv head,
    each a group of them, and the tiles of a pair.
    """

    tiles: _Tiles
    kv_heads: int
    groups: int
    heads: int

    def _spec(self, shape, place) -> pl.BlockSpec:
        def index(i, group, p, code_ref, *_):
            b, kv = lax.div(i, self.kv_heads), lax.rem(i, self.kv_heads)
            code = _entry(code_ref, b, p)
            return place(b, kv, kv * self.groups + group, _query_tile(code), _key_tile(code))

        return pl.BlockSpec(shape, index)

    def queries(self, width: int) -> pl.BlockSpec:
        """Of [B, N, T, width]."""
        shape = (1, self.heads, self.tiles.queries, width)
        return self._spec(shape, lambda b, kv, n, i, j: (b, n, i, 0))

    def query_rows(self) -> pl.BlockSpec:
        """Of [B, N, 1, T]."""
        shape = (1, self.heads, 1, self.tiles.queries)
        return self._spec(shape, lambda b, kv, n, i, j: (b, n, 0, i))

    def query_row(self) -> pl.BlockSpec:
        """Of [B, 1, T], queries."""
        return self._spec((1, 1, self.tiles.queries), lambda b, kv, n, i, j: (b, 0, i))

    def keys(self, width: int) -> pl.BlockSpec:
        """Of [B, K, T, width]."""
        return self._spec((1, 1, self.tiles.keys, width), lambda b, kv, n, i, j: (b, kv, j, 0))

    def key_row(self) -> pl.BlockSpec:
        """Of [B, 1, T], keys."""
        return self._spec((1, 1, self.tiles.keys), lambda b, kv, n, i, j: (b, 0, j))

    def chunk(self, length: int, width: int) -> pl.BlockSpec:
        """Of [B, K, length, width], whole."""
        return self._spec((1, 1, length, width), lambda b, kv, n, i, j: (b, kv, 0, 0))


def _call(body, name, out, blocks, args, in_specs, out_specs, scratch, told, tuning, **more):
    """Runs a kernel over all pairs. told: the list of pairs, how long it is, and scalars besides.

    Cores of v5p (two act as one device) share the first dimension that `semantics` calls parallel.
    """
    code_BP, count, *scalars = told
    scalars = [jnp.asarray(x, jnp.int32).reshape(1) for x in scalars]
    semantics = (pltpu.PARALLEL, more.pop("groups", pltpu.ARBITRARY), pltpu.ARBITRARY)
    rows = args[0].shape[0] * blocks.kv_heads
    return pl.pallas_call(
        body,
        out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(scalars),
            grid=(rows, blocks.groups, count),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=tuning.vmem
        ),
        interpret=pltpu.InterpretParams() if tuning.interpret else False,
        name=name,
        **more,
    )(jnp.asarray(code_BP), *scalars, *args)


def _heads(group: int, queries: int, rows: int) -> int:
    """Query heads of a tile: the most that divide the group and make no more than `rows`."""
    return max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * queries <= rows))


def _ends(begin_B1T: jax.Array) -> jax.Array:
    """Where the document of each position ends, from where it begins."""
    T = begin_B1T.shape[2]
    at_T = jnp.arange(T, dtype=jnp.int32)[None, None]
    # The next position that begins a document is where this one ends.
    starts_B1T = jnp.where(begin_B1T == at_T, at_T, T)
    next_B1T = jnp.pad(starts_B1T[:, :, 1:], ((0, 0), (0, 0), (0, 1)), constant_values=T)
    return lax.cummin(next_B1T, axis=2, reverse=True)


def _entry(code_ref, b, p):
    return code_ref[b if code_ref.shape[0] > 1 else 0, p]


def _query_tile(code):
    return code >> QUERY_SHIFT


def _key_tile(code):
    return (code >> KEY_SHIFT) & ((1 << (QUERY_SHIFT - KEY_SHIFT)) - 1)


def _places(code, tiles):
    """First query and first key of a pair."""
    return _query_tile(code) * tiles.queries, _key_tile(code) * tiles.keys


def _has(code, flag):
    return (code & flag) != 0


def _masked_or_not(code, step) -> None:
    """A step of a pair, with a mask where some of it is masked."""
    for masked in (True, False):
        which = (code & (LIVE | EDGE)) == (LIVE | EDGE if masked else LIVE)
        pl.when(which)(functools.partial(step, masked))


def _dot(lhs, rhs, over):
    """Product in float32 over one axis of each. bfloat16 products are exact in float32, so that
    JAX's default precision, which may ask for more passes, has nothing to add.
    """
    dims = (((over[0],), (over[1],)), ((), ()))
    return lax.dot_general(
        lhs, rhs, dims, precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32
    )


def _lanes(width: int) -> int:
    """`width` in whole vectors of lanes."""
    return -(-width // LANES) * LANES


def _across(x_rl, width):
    """A value of each row, that stands in all 128 lanes, in `width` of them."""
    return _beside([x_rl] * (_lanes(width) // LANES))[:, :width]


def _along(x_ll):
    """Along the lanes what stands in each of 128 rows, in all lanes or in one: the diagonal, which
    costs less than to transpose.
    """
    row_ll, lane_ll = (lax.broadcasted_iota(jnp.int32, (LANES, LANES), i) for i in range(2))
    diagonal_ll = row_ll == lane_ll
    return jnp.where(diagonal_ll, x_ll, 0.0).sum(axis=0, keepdims=True)


def _beside(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
