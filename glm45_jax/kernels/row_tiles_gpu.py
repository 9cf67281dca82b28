"""What products of grouped rows share on Hopper, in Pallas Mosaic GPU: the table of row tiles, the
ring of loads, the stores of ragged tiles. Types to know: `Tiles`, `Turns`. Letters: R E; P row
tiles, N groups and the rows past them, C CTAs, J turns of one, T of all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from glm45_jax.kernels.hopper import BYTES, tiling

ROWS = 128  # of a tile: 64 a consumer
FEW = 32  # rows a group up to which, in the mean, tiles have half the rows
HALF = 64  # rows of a tile that one consumer owns, and columns of an output chunk
SLOTS = 2  # output chunks in flight a consumer
CTAS = 132  # streaming multiprocessors of an H100
PRODUCER = 2  # index of the warpgroup that loads; 0 and 1 multiply


@struct.dataclass
class Tiles:
    """Which rows each row tile holds. One table serves forward, dlhs and drhs of a routing.

    rows_E: as given. end_E: row after each group. expert_P: group of a tile, E for rows past the
    last group. start_P, end_P: rows of that group. first_P, next_P: its first tile and the one
    after its last; next_P[-1] is the number of tiles. rows: of a tile, ROWS or HALF.
    """

    rows_E: jax.Array
    end_E: jax.Array
    expert_P: jax.Array
    start_P: jax.Array
    end_P: jax.Array
    first_P: jax.Array
    next_P: jax.Array
    rows: int = struct.field(pytree_node=False, default=ROWS)

    @property
    def table(self) -> tuple[jax.Array, ...]:
        """What `walk_tiles` wants."""
        return self.expert_P, self.start_P, self.end_P, self.first_P, self.next_P


def lay_tiles(rows_E: jax.Array, *, n_rows: int, rows: int = ROWS) -> Tiles:
    """The table, by comparing and reducing alone: two fused XLA kernels, where a cumulative sum and
    a binary search are dozens.
    """
    E = rows_E.shape[0]
    P = n_rows // rows + E + 1
    rows_E = rows_E.astype(jnp.int32)
    upto_EE = jnp.arange(E)[None, :] <= jnp.arange(E)[:, None]
    tiles_E = lax.div(rows_E + (rows - 1), rows)
    end_E = jnp.where(upto_EE, rows_E[None, :], 0).sum(axis=1)
    next_E = jnp.where(upto_EE, tiles_E[None, :], 0).sum(axis=1)
    total = next_E[-1] + lax.div(n_rows - end_E[-1] + (rows - 1), rows)
    done_PE = next_E[None, :] <= jnp.arange(P, dtype=jnp.int32)[:, None]
    return Tiles(
        rows_E=rows_E,
        end_E=end_E,
        expert_P=done_PE.astype(jnp.int32).sum(axis=1),
        start_P=jnp.where(done_PE, end_E[None, :], 0).max(axis=1),
        end_P=jnp.where(done_PE, n_rows, end_E[None, :]).min(axis=1),
        first_P=jnp.where(done_PE, next_E[None, :], 0).max(axis=1),
        next_P=jnp.where(done_PE, total, next_E[None, :]).min(axis=1),
        rows=rows,
    )


def lay_bands(n_rows: int, *, band: int, rows: int) -> Tiles:
    """The table of a dense product: groups of `band` rows, which all meet one matrix. Constants:
    nothing to compute on the device.
    """
    start_G = np.arange(0, n_rows, band)
    end_G = np.minimum(start_G + band, n_rows)
    tiles_G = -(-(end_G - start_G) // rows)
    group_P = np.repeat(np.arange(len(start_G)), tiles_G)
    next_G = np.cumsum(tiles_G)
    table: dict[str, Any] = {
        "rows_E": end_G - start_G,
        "end_E": end_G,
        "expert_P": group_P,
        "start_P": start_G[group_P],
        "end_P": end_G[group_P],
        "first_P": (next_G - tiles_G)[group_P],
        "next_P": next_G[group_P],
    }
    return Tiles(**{k: x.astype(np.int32) for k, x in table.items()}, rows=rows)


@struct.dataclass
class Turns:
    """The tile of each turn of each CTA, [ctas * J]: of ROWS rows, or of HALF where no more are
    left.

    group_T: its group, E for rows past the last. row_T: its first row. left_T: rows of the group
    from there on. tile_T: which of the tiles of columns. ends_CN: turns of each CTA up to the end
    of each group; the last are all.
    """

    group_T: jax.Array
    row_T: jax.Array
    left_T: jax.Array
    tile_T: jax.Array
    ends_CN: jax.Array

    @property
    def table(self) -> tuple[jax.Array, ...]:
        """What `walk_turns` wants."""
        return self.group_T, self.row_T, self.left_T, self.tile_T, self.ends_CN


def lay_turns(tiles: Tiles, *, n_rows: int, n_tiles: int, ctas: int = CTAS) -> Turns:
    """Of each group tiles of ROWS rows, and one of HALF for up to HALF last rows. Both kinds go
    round the CTAs, each by itself, so that all CTAs have as many of both. Rows fastest: they share
    the matrix.
    """
    E = tiles.rows_E.shape[0]
    rest_E = lax.rem(tiles.rows_E, jnp.int32(ROWS))
    half_E = ((rest_E > 0) & (rest_E <= HALF)).astype(jnp.int32)
    whole_E = lax.div(tiles.rows_E + (ROWS - 1), jnp.int32(ROWS)) - half_E
    past = lax.div(n_rows - tiles.end_E[-1] + (ROWS - 1), jnp.int32(ROWS))  # whole, of zeros
    upto_NE = jnp.arange(E)[None, :] <= jnp.arange(E + 1)[:, None]
    wholes_N = jnp.where(upto_NE, whole_E[None, :], 0).sum(axis=1).at[-1].add(past)
    halves_N = jnp.where(upto_NE, half_E[None, :], 0).sum(axis=1)
    stop_N = jnp.concatenate([tiles.end_E, jnp.full((1,), n_rows, jnp.int32)])

    def share(units, cta):
        """How many of the first units are a CTA's."""
        return lax.div(units - cta + (ctas - 1), jnp.int32(ctas))

    # Halves go round from the last CTA on: who has one whole tile more has no half one more.
    cta_C1 = jnp.arange(ctas, dtype=jnp.int32)[:, None]
    back_C1 = ctas - 1 - cta_C1
    ends_CN = share(wholes_N[None, :] * n_tiles, cta_C1)
    ends_CN += share(halves_N[None, :] * n_tiles, back_C1)
    J = -(-(n_rows // ROWS + E + 1) * n_tiles // ctas) + 1
    turn_1J = jnp.arange(J, dtype=jnp.int32)[None, :]
    done_CJN = ends_CN[:, None, :] <= turn_1J[:, :, None]

    def before(x_N):
        """[C, J]: the value of the last group that is done."""
        return jnp.where(done_CJN, x_N[None, None, :], 0).max(axis=2)

    def upto(x_N):
        """[C, J]: of the group at hand."""
        return jnp.where(done_CJN, 2**30, x_N[None, None, :]).min(axis=2)

    wholes, halves, start, end = before(wholes_N), before(halves_N), before(stop_N), upto(stop_N)
    count = upto(wholes_N) - wholes
    # A turn is the nth whole tile of its group that is the CTA's, or, after these, the nth half.
    had, had_halves = share(wholes * n_tiles, cta_C1), share(halves * n_tiles, back_C1)
    nth = turn_1J - had - had_halves
    nth_half = nth - (share((wholes + count) * n_tiles, cta_C1) - had)
    half, some = nth_half >= 0, jnp.maximum(count, 1)
    unit = cta_C1 + ctas * (had + nth) - wholes * n_tiles
    half_unit = back_C1 + ctas * (had_halves + nth_half) - halves * n_tiles
    row = start + jnp.where(half, count, lax.rem(unit, some)) * ROWS
    row = jnp.maximum(jnp.minimum(row, end - jnp.where(half, HALF, ROWS)), start)
    tile = jnp.where(half, half_unit, lax.div(unit, some))
    return Turns(
        group_T=done_CJN.astype(jnp.int32).sum(axis=2).reshape(-1),
        row_T=row.reshape(-1),
        left_T=(end - row).reshape(-1),
        tile_T=tile.reshape(-1),
        ends_CN=ends_CN,
    )


def tile_rows(n_rows: int, groups: int) -> int:
    """Rows of a tile: few where groups are small, so that no half of it is empty."""
    return HALF if n_rows <= FEW * groups else ROWS


@dataclasses.dataclass(frozen=True)
class Ring:
    """Stages between the producer and the consumers: step `i` of a CTA lies in slot i % stages."""

    stages: int
    full: Any
    empty: Any

    def slot(self, i):
        """Where step i lies."""
        return lax.rem(i, jnp.int32(self.stages))

    def claim(self, i):
        """Producer: waits until both consumers have left the slot of step i."""

        @pl.when(i >= self.stages)
        def _():
            plgpu.barrier_wait(self.empty.at[self.slot(i)])

        return self.slot(i)

    def wait(self, i):
        """Consumer: waits until step i is loaded."""
        plgpu.barrier_wait(self.full.at[self.slot(i)])
        return self.slot(i)

    def release(self, i):
        """Consumer: has read step i."""
        plgpu.barrier_arrive(self.empty.at[self.slot(i)])

    def leave(self, i):
        """Consumer: has no use for step i."""
        self.wait(i)
        self.release(i)

    def drain(self, n):
        """Producer, after n steps: waits until the last of them have been read."""
        for back in range(self.stages, 0, -1):

            @pl.when(n >= back)
            def _(back=back):
                plgpu.barrier_wait(self.empty.at[self.slot(n - back)])


def two_views(n: int, dtype: Any, interpret: Any) -> Any:
    """SMEM of n blocks of 64 rows of 128 bytes, tiled by 8 rows for wgmma, and the same bytes row
    by row.

    TMA takes any row only of the second: a tiled block wants rows that are multiples of 8. The
    interpreter knows no shared bytes; it gets one view and needs no more.
    """
    width = BYTES // jnp.dtype(dtype).itemsize
    blocks = plgpu.SMEM((n, HALF, width), dtype, **tiling(8, dtype))
    if interpret:
        return blocks
    return plgpu.RefUnion(blocks, plgpu.SMEM((n * HALF, width), dtype, **tiling(1, dtype)))


def views(refs: Any, interpret: Any) -> tuple[Any, Any]:
    """(blocks, function from block, first row and number of rows to the bytes TMA copies)."""
    if interpret:
        return refs, lambda block, row, n: refs.at[block, pl.ds(row, n)]
    blocks, flat = refs
    return blocks, lambda block, row, n: flat.at[pl.ds(block * HALF + row, n)]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The persistent CTAs: CTA c has tiles c, c + ctas, ..."""

    interpret: Any

    @property
    def ctas(self) -> int:
        """How many; two are enough to interpret."""
        return 2 if self.interpret else CTAS

    def tiles(self, total):
        """Tiles of this CTA, of `total`."""
        return lax.div(total - self.tile(0) + (self.ctas - 1), jnp.int32(self.ctas))

    def tile(self, j):
        """Its j-th."""
        return lax.axis_index("cta") + j * self.ctas

    def call(self, body: Any, out: Any, scratch: dict[str, Any], threads: int = 3) -> Any:
        """The kernel, to be called with its arrays. out: of one result, or a tuple. threads:
        warpgroups of a CTA.
        """
        return plgpu.kernel(
            body,
            out_type=out,
            scratch_types=scratch,
            grid=(self.ctas,),
            grid_names=("cta",),
            num_threads=threads,
            thread_name="wg",
            interpret=self.interpret,
        )


Walk = tuple[Any, Callable[[Any], tuple[Any, ...]]]


def walk_tiles(table: Any, grid: Grid, *, rows: int, n_tiles: int) -> Walk:
    """How many tiles a CTA has, of a table of `Tiles`, and find(j) -> (group, first row, rows of
    the group from there on, tile of columns) of its j-th. Rows fastest: they share the matrix.
    """
    expert_P, start_P, end_P, first_P, next_P = table

    def find(j):
        t = grid.tile(j)
        p = lax.div(t, jnp.int32(n_tiles))
        start, end, first = start_P[p], end_P[p], first_P[p]
        count, within = next_P[p] - first, t - first * n_tiles
        row = start + lax.rem(within, count) * rows
        row = jnp.maximum(jnp.minimum(row, end - rows), start)
        return expert_P[p], row, end - row, lax.div(within, count)

    return grid.tiles(next_P[next_P.shape[0] - 1] * n_tiles), find


def walk_turns(table: Any, grid: Grid) -> Walk:
    """The same of a table of `Turns`."""
    *columns, ends_CN = table
    cta, most = lax.axis_index("cta"), columns[0].shape[0] // grid.ctas
    return ends_CN[cta, ends_CN.shape[1] - 1], lambda j: tuple(c[cta * most + j] for c in columns)


@struct.dataclass
class Place:
    """Where a tile goes: first row and column, rows that count, whether they are zeros (None: as
    computed), the matrix where there are several. A consumer's own part is a place too.
    """

    row: Any
    column: Any
    rows: Any
    zeros: Any
    matrix: Any

    def lower(self, wg: Any) -> Place:
        """The rows of a consumer."""
        return self.replace(row=self.row + wg * HALF, rows=self.rows - wg * HALF)

    def right(self, wg: Any, columns: int) -> Place:
        """That many columns, of a consumer."""
        return self.replace(column=self.column + wg * columns)


def consume(
    ring: Ring,
    n_tiles: Any,
    locate: Any,
    multiply: Any,
    store: Any,
    *,
    columns: int,
    overlap: int,
    dtype: Any,
    nowhere: Place | None = None,
    finish: Any = None,
    results: int = 1,
    share: Any = None,
) -> None:
    """The loop of a consumer over its tiles of 64 rows: each is stored over the first `overlap`
    steps of the next, a part after each step is issued; at once with 0.

    results: sums of `columns` columns that a step adds to, by a wgmma each. locate(j) -> (steps,
    place, context), steps >= max(1, overlap). multiply(accs, slot, k, context) issues them.
    finish(sums, place, context) -> what to store of one, of `dtype`; without it, rounded sums.
    store(values, place, part, parts) writes part `part` of all. nowhere: a place of its kind, where
    that has fewer fields.
    share(steps, place) -> how many of the steps this consumer multiplies, `overlap` at least; it
    leaves the others to the other one.
    """

    def tile(j, carry):
        i, before, values = carry
        steps, place, context = locate(j)
        own = share(steps, place) if share else steps

        def accumulate(*accs):
            for k in range(overlap):
                multiply(accs, ring.wait(i + k), jnp.int32(k), context)
                if k:
                    plgpu.wgmma_wait(results)
                    ring.release(i + k - 1)

                @pl.when(j > 0)
                def _(k=k):
                    store(values, before, k, overlap)

            def step(k, _):
                multiply(accs, ring.wait(i + k), k, context)
                plgpu.wgmma_wait(results)
                if overlap:
                    ring.release(i + k - 1)
                else:
                    pl.when(k > 0)(lambda: ring.release(i + k - 1))

            lax.fori_loop(jnp.int32(overlap), own, step, None)
            return tuple(acc[...] for acc in accs)

        sums = pl.run_scoped(accumulate, *(plgpu.ACC((HALF, columns)) for _ in range(results)))
        ring.release(i + own - 1)
        if share:
            lax.fori_loop(own, steps, lambda k, _: ring.leave(i + k), None)
        rounded = finish or (lambda x, *_: x.astype(dtype))
        values = tuple(rounded(x, place, context) for x in sums)
        if not overlap:
            store(values, place, 0, 1)
        return i + steps, place, values

    nothing = plgpu.layout_cast(jnp.zeros((HALF, columns), dtype), plgpu.Layout.WGMMA)
    nothing, zero = (nothing,) * results, jnp.int32(0)
    start = nowhere or Place(zero, zero, zero, zero > 0, zero)
    _, place, values = lax.fori_loop(zero, n_tiles, tile, (zero, start, nothing))
    if overlap:

        @pl.when(n_tiles > 0)
        def _():
            store(values, place, 0, 1)

    plgpu.wait_smem_to_gmem(0)


def chunks(n: int, part: int = 0, parts: int = 1) -> range:
    """Part `part` of n chunks, of `parts` nearly equal ones; the first is never empty."""
    return range(-(-n * part // parts), -(-n * (part + 1) // parts))


def store_rows(
    values: tuple[Any, ...],
    place: Place,
    blocks: Any,
    bytes_of: Any,
    targets: tuple[Any, ...],
    slots: int = SLOTS,
    part_of: tuple[int, int] = (0, 1),
    choose: Any = lambda n, *pieces: pieces[n],
) -> None:
    """Writes a consumer's 64 rows in chunks of 128 bytes, by TMA, `slots` at once; of a short
    group just its rows. Targets take turns, chunk by chunk; part_of: as `chunks` has them.

    choose(n, *chunks of all values) -> what target n gets of them; by itself value n.
    """
    wg, width = lax.axis_index("wg"), blocks.shape[-1]
    valid, row = jnp.clip(place.rows, 0, HALF), place.row
    for turn in chunks(len(targets) * values[0].shape[1] // width, *part_of):
        c, n = divmod(turn, len(targets))
        target = targets[n].at[place.matrix] if targets[n].ndim == 3 else targets[n]
        value = choose(n, *(v[:, c * width : (c + 1) * width] for v in values))
        block = wg * slots + turn % slots
        columns = pl.ds(pl.multiple_of(place.column + c * width, width), width)
        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
        blocks[block] = value

        if place.zeros is not None:
            # Not by a select of the sums: ptxas then takes them for read while wgmma runs (C7514)
            # and waits after every step.
            @pl.when(place.zeros)
            def _(block=block, value=value):
                blocks[block] = jnp.zeros(value.shape, value.dtype)

        plgpu.commit_smem()

        @pl.when(valid == HALF)
        def _(block=block, columns=columns, target=target):
            to = target.at[pl.ds(row, HALF), columns]
            plgpu.copy_smem_to_gmem(bytes_of(block, 0, HALF), to, commit_group=False)

        @pl.when(valid < HALF)
        def _(block=block, columns=columns, target=target):
            done = jnp.int32(0)
            for n in (32, 16, 8, 4, 2, 1):
                # TMA shapes are static: the set bits of `valid`, largest first.
                @pl.when((valid & n) != 0)
                def _(n=n, done=done):
                    to = target.at[pl.ds(row + done, n), columns]
                    plgpu.copy_smem_to_gmem(bytes_of(block, done, n), to, commit_group=False)

                done = done + (valid & n)

        plgpu.commit_smem_to_gmem_group()


def load_half(
    x: Any, inner: Any, place: Place, bytes_of: Any, slot: Any, halves: int, barrier: Any
) -> None:
    """As `load_rows`, of a tile of HALF rows where others have more: into the first block, in as
    many copies, which the barrier counts.
    """
    n = HALF // halves
    for at in range(0, HALF, n):
        rows = x.at[pl.ds(place.row + at, n), inner]
        plgpu.copy_gmem_to_smem(rows, bytes_of(slot * halves, at, n), barrier)


def load_rows(
    x: Any, inner: Any, place: Place, bytes_of: Any, slot: Any, halves: int, barrier: Any
) -> None:
    """Starts the copies of a tile's rows, a block of 64 each, `halves` of them. Of a lone block
    just the rows that count, up to 8, 16, 32 or 64: what lies in the others is multiplied into rows
    that are not stored.
    """

    def copy(block, row, n):
        plgpu.copy_gmem_to_smem(x.at[pl.ds(row, n), inner], bytes_of(block, 0, n), barrier)

    if halves > 1:
        for half in range(halves):
            copy(slot * halves + half, place.row + half * HALF, HALF)
        return
    for fewer, n in ((0, 8), (8, 16), (16, 32), (32, HALF)):
        rows = jnp.clip(place.rows, 1, HALF)

        @pl.when((rows > fewer) & (rows <= n))
        def _(n=n):
            copy(slot, place.row, n)
