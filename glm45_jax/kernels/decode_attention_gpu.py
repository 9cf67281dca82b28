"""Paged decode attention for Hopper in Pallas Mosaic GPU: a few new tokens a row, pages in place.

A block is one warpgroup with one kv head of one row and `split` of its keys; several blocks share a
multiprocessor and hide each other's waits. Keys are the rows of both products (scores^T = K q^T,
out^T = V^T p^T), so the G heads x T tokens that share a kv head are columns, 8 at a time, and no
row of a product is padding. Which keys a block takes depends on the row alone: the same bits
whatever else is in the batch.
Letters: B T N K G H, L P S of the pages, M = T x G columns, C splits.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from glm45_jax.kernels import hopper
from glm45_jax.kernels.hopper import COLUMN, ROW
from glm45_jax.kernels.tuning import tuned

LOWEST = -1e30  # finite: a block all of whose keys come after a query has no NaN
LOG2_E = math.log2(math.e)
AT_ONCE = 4  # splits that are combined in one step


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes that do not change the result (`edges` change its rounding) but its speed.

    keys: of one step. stages: steps in flight. edges: of splits, instead of those picked.
    """

    keys: int = 64
    stages: int = 2
    edges: tuple[int, ...] | None = None
    interpret: bool = False


@functools.partial(jax.jit, static_argnames=("skip", "tuning"))
def paged_attention(
    q_BTNH: jax.Array,
    k_LPSKH: jax.Array,
    v_LPSKH: jax.Array,
    *,
    layer: jax.Array,
    table_BP: jax.Array,
    start_B: jax.Array,
    skip: int = 0,
    tuning: Tuning | None = None,
) -> jax.Array:
    """`decode_attention` on one device. Queries without a key give zeros."""
    B, T, N, H = q_BTNH.shape
    size, K = k_LPSKH.shape[2:4]
    G = N // K
    capacity = table_BP.shape[1] * size
    key = {"B": B, "K": K, "M": T * G, "H": H, "S": capacity, "bytes": k_LPSKH.dtype.itemsize}
    tuning = tuning or tuned("paged_attention", Tuning(), **key)
    q_BKMH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
    q_BKMH = jnp.pad(q_BKMH, ((0, 0), (0, 0), (0, -(T * G) % 8), (0, 0)))
    if k_LPSKH.dtype != q_BTNH.dtype:
        q_BKMH = q_BKMH.astype(jnp.float16)  # what 8 bits turn into without loss
    sizes = _Sizes(T, G, skip, tuning.edges or edges(capacity, B * K), tuning)
    acc_BKCMH, top_BKC2M = _partial(q_BKMH, k_LPSKH, v_LPSKH, layer, table_BP, start_B, sizes)
    return _combine(q_BTNH, acc_BKCMH, top_BKC2M, start_B, sizes)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What both kernels know. edges: where each split of a row begins, and the end of the last."""

    T: int
    G: int
    skip: int
    edges: tuple[int, ...]
    tuning: Tuning

    @property
    def splits(self) -> int:
        """How many a row of the whole table has."""
        return len(self.edges) - 1


def edges(capacity: int, pairs: int) -> tuple[int, ...]:
    """Where the splits of a row begin, to its `capacity` in keys: each twice as long, to a limit.

    Blocks of late, long splits start first and those of the short ones fill the gaps at the end; a
    short row has several too. pairs: rows x kv heads; few of them need shorter splits.
    """
    least, most = (1024, 4096) if pairs >= 256 else (512, 2048) if pairs >= 64 else (256, 1024)
    found = [0]
    while found[-1] < capacity:
        found.append(min(capacity, found[-1] + min(max(found[-1], least), most)))
    return tuple(found)


def _partial(q_BKMH, k_LPSKH, v_LPSKH, layer, table_BP, start_B, sizes):
    """Sums of each split, float32 [B, K, C, M, H]; and its highest score in base 2 and sum of
    weights, [B, K, C, 2, M]. Not written for splits that begin after a row's last key.
    """
    B, K, M, H = q_BKMH.shape
    P, S = k_LPSKH.shape[1:3]
    tuning = sizes.tuning
    keys, stages, dtype = tuning.keys, tuning.stages, q_BKMH.dtype
    pages, width, narrow = keys // S, table_BP.shape[1], k_LPSKH.dtype != dtype
    scale = LOG2_E / math.sqrt(H)

    def kernel(
        layer_ref, start_ref, edge_ref, table_ref, q_ref, k_ref, v_ref, acc_ref, top_ref, mem
    ):
        c, b, kv = sizes.splits - 1 - lax.axis_index("c"), lax.axis_index("b"), lax.axis_index("kv")
        first, start, at_layer = edge_ref[c], start_ref[b], layer_ref[0]
        count = jnp.minimum(start + sizes.T, edge_ref[c + 1]) - first  # keys of this block
        steps = pl.cdiv(count, keys)
        last_page = jnp.minimum(lax.div(start + sizes.T - 1, S), width - 1)

        def copy(wanted):
            """Starts the copies of the pages of steps, {name: step}, by one warp."""

            @plgpu.warp_map
            def _(warp):
                one = warp == lax.rem(kv, 4)  # warps of one number share a scheduler
                for name, step in wanted.items():
                    ref = {"k": k_ref, "v": v_ref}[name]
                    pl.when(one & (step >= 0) & (step < steps))(
                        functools.partial(copy_step, name, ref, step)
                    )

        def copy_step(name, ref, step):
            slot, begin = lax.rem(step, stages), lax.div(first + step * keys, S)
            at = [jnp.minimum(begin + i, last_page) for i in range(pages)]
            ids = [jnp.clip(table_ref[b, i], 0, P - 1) for i in at]  # all, before any is waited for
            for i, page in enumerate(ids):
                plgpu.copy_gmem_to_smem(
                    ref.at[at_layer, page, :, kv],
                    mem[name].at[slot, pl.ds(i * S, S)],
                    mem[f"{name}_full"].at[slot],
                )

        def live():
            plgpu.copy_gmem_to_smem(q_ref.at[b, kv], mem["q"], mem["q_full"])
            for step in range(stages):
                copy({"k": jnp.int32(step), "v": jnp.int32(step)})
            plgpu.barrier_wait(mem["q_full"])

            def widened(slot, step):
                """Writes the values of a step once more, as the product takes them. Into another
                place than the last step's, which other warps may still multiply.
                """
                plgpu.barrier_wait(mem["v_full"].at[slot])
                mem["v16"][lax.rem(step, 2)] = mem["v"][slot].astype(dtype)

            def one_step(masked, step, carry):
                acc, top, total = carry
                slot, again = lax.rem(step, stages), step + stages
                plgpu.barrier_wait(mem["k_full"].at[slot])
                k = mem["k"][slot].astype(dtype) if narrow else mem["k"].at[slot]
                widen = functools.partial(widened, slot, step) if narrow else None
                score = _scores(k, mem["q"].transpose((1, 0)), widen, tuning.interpret)
                if masked:
                    key = hopper.index(score.shape, 0) + (first + step * keys)
                    seen = start + lax.div(hopper.index(score.shape, 1), sizes.G)
                    seen = (key <= seen) & (key >= sizes.skip) if sizes.skip else key <= seen
                    score = jnp.where(seen, score, -jnp.inf)
                new = jnp.maximum(top, score.max(axis=0) * scale)  # all warps meet here
                if not narrow:
                    copy({"k": again, "v": jnp.where(step > 0, again - 1, -1)})
                p = jnp.exp2(score * scale - hopper.down(new, keys))
                shrink = jnp.exp2(top - new)
                mem["p"].transpose((1, 0))[...] = p.astype(dtype)
                plgpu.commit_smem()
                if narrow:  # both have been read
                    copy({"k": again, "v": again})
                    v = mem["v16"].at[lax.rem(step, 2)]
                else:
                    plgpu.barrier_wait(mem["v_full"].at[slot])
                    v = mem["v"].at[slot]
                acc = acc * hopper.down(shrink, H)
                acc = _add(acc, v.transpose((1, 0)), mem["p"].transpose((1, 0)), tuning.interpret)
                return acc, new, total * hopper.down(shrink, keys) + p

            whole = jnp.clip(lax.div(start + 1 - first, keys), 0, steps)
            carry = (
                hopper.filled((H, M), 0.0, plgpu.Layout.WGMMA),
                hopper.filled((M,), LOWEST, COLUMN),
                hopper.filled((keys, M), 0.0, plgpu.Layout.WGMMA),
            )
            edge, inner = (functools.partial(one_step, masked) for masked in (True, False))
            lead = jnp.int32(0)
            if sizes.skip:  # the first step of a row
                lead = jnp.minimum(jnp.where(first < sizes.skip, 1, 0), whole)
                carry = lax.fori_loop(0, lead, edge, carry)
            carry = lax.fori_loop(lead, whole, inner, carry)
            acc, top, total = lax.fori_loop(whole, steps, edge, carry)
            acc = plgpu.layout_cast(acc, plgpu.Layout.WGMMA_TRANSPOSED)
            acc_ref.at[b, kv, c].transpose((1, 0))[...] = acc
            top_ref.at[b, kv, c, 0][...] = top
            top_ref.at[b, kv, c, 1][...] = total.sum(axis=0)

        pl.when(steps > 0)(live)

    scratch = dict(
        q=_tiles((M, H), dtype),
        k=_tiles((stages, keys, H), k_LPSKH.dtype),
        v=_tiles((stages, keys, H), v_LPSKH.dtype),
        p=_tiles((M, keys), dtype),
        q_full=plgpu.Barrier(),
        k_full=plgpu.Barrier(num_arrivals=pages, num_barriers=stages),
        v_full=plgpu.Barrier(num_arrivals=pages, num_barriers=stages),
    )
    if narrow:
        scratch["v16"] = _tiles((2, keys, H), dtype)
    out = (
        jax.ShapeDtypeStruct((B, K, sizes.splits, M, H), jnp.float32),
        jax.ShapeDtypeStruct((B, K, sizes.splits, 2, M), jnp.float32),
    )
    grid = dict(c=sizes.splits, b=B, kv=K)
    run = _launch(kernel, out, grid, tuning, [scratch], reduction_scratch_bytes=M // 8 * 1024)
    edge_C = jnp.asarray(sizes.edges, jnp.int32)
    layer_1 = jnp.asarray(layer, jnp.int32).reshape(1)
    return run(layer_1, start_B, edge_C, table_BP, q_BKMH, k_LPSKH, v_LPSKH)


def _combine(q_BTNH, acc_BKCMH, top_BKC2M, start_B, sizes):
    """One result of the splits, in their order, [B, T, N, H]: a block each row, token and head."""
    B, T, N, H = q_BTNH.shape
    G = sizes.G

    def kernel(start_ref, edge_ref, acc_ref, top_ref, out_ref):
        b, t, n = (lax.axis_index(x) for x in ("b", "t", "n"))
        kv, m = lax.div(n, G), t * G + lax.rem(n, G)
        held = start_ref[b] + T

        def some(block, carry):
            """Several at a time, so that their loads are under way together."""
            acc, total, top = carry
            live, parts = [], []
            for i in range(AT_ONCE):
                c = jnp.minimum(block * AT_ONCE + i, sizes.splits - 1)
                live.append((edge_ref[c] < held) & (block * AT_ONCE + i < sizes.splits))
                c = jnp.where(live[-1], c, 0)
                part = plgpu.load(acc_ref.at[b, kv, c, m], layout=ROW, optimized=False)
                parts.append((part, top_ref[b, kv, c, 0, m], top_ref[b, kv, c, 1, m]))
            new = top
            for ok, (_, highest, _) in zip(live, parts, strict=True):
                new = jnp.maximum(new, jnp.where(ok, highest, LOWEST))
            shrink = jnp.exp2(top - new)
            acc, total = acc * shrink, total * shrink
            for ok, (part, highest, weights) in zip(live, parts, strict=True):
                weight = jnp.where(ok, jnp.exp2(highest - new), 0)
                acc, total = acc + part * weight, total + weights * weight
            return acc, total, new

        def live():
            carry = hopper.filled((H,), 0.0, ROW), jnp.float32(0), jnp.float32(LOWEST)
            blocks = pl.cdiv(sizes.splits, AT_ONCE)
            acc, total, _ = lax.fori_loop(0, blocks, some, carry)
            whole = acc / jnp.where(total > 0, total, 1)
            out_ref.at[b, t, n][...] = whole.astype(q_BTNH.dtype)

        def idle():
            out_ref.at[b, t, n][...] = hopper.filled((H,), 0.0, ROW).astype(q_BTNH.dtype)

        pl.when(held > 0)(live)
        pl.when(held <= 0)(idle)

    out = jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype)
    run = _launch(kernel, out, dict(b=B, t=T, n=N), sizes.tuning)
    return run(start_B, jnp.asarray(sizes.edges, jnp.int32), acc_BKCMH, top_BKC2M)


def _launch(body, out, grid, tuning, scratch=(), **params):
    """The kernel as a function: one warpgroup a block, which says itself when its warps meet."""
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, **params
        ),
        interpret=plgpu.InterpretGPUParams() if tuning.interpret else None,
    )


def _tiles(shape, dtype):
    """Shared memory as TMA writes and wgmma reads it."""
    row = min(128, shape[-1] * jnp.dtype(dtype).itemsize)
    tiling = plgpu.TilingTransform((8, row // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(row)  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def _scores(k, q, meanwhile, interpret):
    """k @ q in float32, beside which other work is done. k: shared memory, or registers, which the
    interpreter does not multiply.
    """
    if interpret and meanwhile:
        meanwhile()
        return jnp.dot(k, q[...], preferred_element_type=jnp.float32)

    def body(ref):
        plgpu.wgmma(ref, k, q)
        if meanwhile:
            meanwhile()
        return ref[...]

    return pl.run_scoped(body, plgpu.ACC((k.shape[0], q.shape[1]), jnp.float32))


def _add(acc, lhs, rhs, interpret):
    """acc + lhs @ rhs, both in shared memory."""
    return hopper.accumulate(acc, lhs[...] if interpret else lhs, rhs, interpret)
