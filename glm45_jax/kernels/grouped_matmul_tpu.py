"""Grouped matmul in Pallas for TPU: forward, dlhs and drhs. Letters: R E D F; V visits; K
contracted.

Types to know: `Visits`, `Plan`. Compiled for v5p and v6e, run only by the interpreter. Matrices are
read from HBM once, rows once for each tile of columns: a tile a core, more where VMEM is short.
While a group is multiplied, the matrix of the next one that has rows is on its way. A visit
multiplies the blocks that hold its rows and not the tile: 1.19 rows for each of 65,536 in 128
groups, where whole tiles of 512 would be 1.99.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from glm45_jax.kernels.dispatch import device, not_tpu

LANES = 128
PACKED = 16  # rows of bfloat16 that one register holds: where a block may begin
ROWS = 128  # UNVERIFIED: fewer at a time take the MXU as long, its next weights load meanwhile
TALL = 2 * ROWS  # rows at a time while a visit has as many
WIDE = 512  # columns of a result at a time
SHARE = 0.65  # of VMEM, for buffers; XLA keeps things of its own there
SPARE_BYTES = 8 * 2**20  # for temporaries: the compiler took 0.4 to 3 MiB at GLM's shapes


@dataclasses.dataclass(frozen=True)
class Chip:
    """cores: that one JAX device joins. vmem_bytes: of one core. heights: rows of a tile, the first
    that fits.
    """

    cores: int
    vmem_bytes: int
    heights: tuple[int, ...] = (1024, 512, 256, 128)


V5P, V6E = Chip(2, 64 * 2**20), Chip(1, 128 * 2**20)
CHIPS = {"TPU v5": V5P, "TPU v5p": V5P, "TPU v6 lite": V6E, "TPU v6e": V6E}  # by device_kind


@dataclasses.dataclass(frozen=True)
class Plan:
    """rows, columns: of a tile of rows, and of the side of a matrix that is cut. vmem_bytes: what
    the kernel may take.
    """

    rows: int
    columns: int
    vmem_bytes: int


@struct.dataclass
class Visits:
    """Meetings of a tile of rows and a group, in the order of rows: a tile that holds parts of
    three groups is visited three times.

    group_V: E past the last group. tile_V: its tile. load_V: the tile to hold, the one before where
    none is read. low_V, high_V: rows of the visit, within the tile. slot_V: 0 and 1 by turns, for
    groups that have rows. first_V, last_V: 1 on a group's first and last visit. next_V: the next
    group that has rows, or -1. count: visits, those behind it are none.
    """

    group_V: jax.Array
    tile_V: jax.Array
    load_V: jax.Array
    low_V: jax.Array
    high_V: jax.Array
    slot_V: jax.Array
    first_V: jax.Array
    last_V: jax.Array
    next_V: jax.Array
    count: jax.Array

    def table(self) -> tuple[jax.Array, ...]:
        """All but the count: what the kernels' scalar units read."""
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "count")


FIELDS = len(dataclasses.fields(Visits)) - 1


def lay_visits(rows_E: jax.Array, *, n_rows: int, height: int, every_group: bool) -> Visits:
    """The visits of these groups by tiles of `height` rows.

    every_group: also of groups without rows, once each, and none of rows past the last group; else
    the other way round.
    """
    E = rows_E.shape[0]
    end_E = jnp.cumsum(rows_E)
    rows_G, end_G = rows_E, end_E
    if not every_group:  # what lies past the last group is one more, which has no matrix
        rows_G = jnp.concatenate([rows_E, n_rows - end_E[-1:]])
        end_G = jnp.concatenate([end_E, jnp.full(1, n_rows, jnp.int32)])
    start_G, G = end_G - rows_G, rows_G.shape[0]
    real_G = (rows_G > 0) & (jnp.arange(G) < E)
    first_G = jnp.where(rows_G > 0, start_G, jnp.maximum(start_G - 1, 0)) // height
    visits_G = jnp.where(rows_G > 0, (end_G - 1) // height - first_G + 1, int(every_group))
    done_G = jnp.cumsum(visits_G)
    V = -(-n_rows // height) + E
    at_V = jnp.arange(V, dtype=jnp.int32)
    group_V = jnp.minimum((done_G[None, :] <= at_V[:, None]).sum(axis=1, dtype=jnp.int32), G - 1)
    owner_VG = group_V[:, None] == jnp.arange(G)[None, :]

    def of_group(x_G: jax.Array) -> jax.Array:
        """x_G[group_V], by sums that XLA makes one loop of; a gather is a kernel of its own."""
        return jnp.where(owner_VG, x_G[None, :], 0).sum(axis=1, dtype=jnp.int32)

    nth_V = at_V - of_group(done_G - visits_G)
    tile_V = jnp.minimum(of_group(first_G) + nth_V, -(-n_rows // height) - 1)
    held = jnp.maximum(end_E[-1] - 1, 0) // height  # the last tile that is read
    later_GG = jnp.arange(G)[None, :] > jnp.arange(G)[:, None]
    next_G = jnp.where(later_GG & real_G[None, :], jnp.arange(G, dtype=jnp.int32)[None, :], G)
    next_G = next_G.min(axis=1)
    return Visits(
        group_V=group_V,
        tile_V=tile_V,
        load_V=jnp.minimum(tile_V, held),
        low_V=jnp.maximum(of_group(start_G) - tile_V * height, 0),
        high_V=jnp.minimum(of_group(end_G) - tile_V * height, height),
        slot_V=of_group((jnp.cumsum(real_G) - 1) % 2),
        first_V=(nth_V == 0).astype(jnp.int32),
        last_V=(nth_V == of_group(visits_G) - 1).astype(jnp.int32),
        next_V=of_group(jnp.where(next_G == G, -1, next_G)),
        count=done_G[-1],
    )


def refuses(
    x_RD: jax.Array, w_EDF: jax.Array, rows_E: jax.Array, *, chip: Chip | None = None
) -> str | None:
    """Why the kernels cannot run on these shapes and dtypes, or None. chip: the one meant if
    None.
    """
    if chip is None:
        if why := not_tpu():
            return why
        kind = device().device_kind
        if kind not in CHIPS:
            return f"is compiled for {sorted(CHIPS)}; this is {kind}"
        chip = CHIPS[kind]
    if x_RD.dtype != jnp.bfloat16 or w_EDF.dtype != jnp.bfloat16:
        return f"rows are {x_RD.dtype}, matrices {w_EDF.dtype}, both must be bfloat16"
    (R, D), F = x_RD.shape, w_EDF.shape[2]
    if not R or D % LANES or F % LANES:
        return f"{R} rows, matrices {D} x {F}: no row, or a side that is no multiple of {LANES}"
    try:
        for plan, sides in ((_plan_rows, (D, F)), (_plan_rows, (F, D)), (_plan_groups, (D, F))):
            plan(R, *sides, chip)
    except ValueError as error:
        return str(error)
    return None


def _cuts(columns: int, cores: int) -> list[int]:
    """Widths of tiles, a tile a core at first, then ever more."""
    tiles = range(cores, columns // LANES + 1, cores) if columns > LANES else (1,)
    widths = [pl.cdiv(pl.cdiv(columns, n), LANES) * LANES for n in tiles]
    return list(dict.fromkeys(w for w in widths if w <= columns)) or [columns]


def _fit(R: int, columns: int, chip: Chip, need: Any, what: str) -> Plan:
    """The widest columns, then the tallest rows, whose buffers fit."""
    tallest = pl.cdiv(R, PACKED) * PACKED
    heights = list(dict.fromkeys(min(h, tallest) for h in chip.heights))
    for width in _cuts(columns, chip.cores):
        for height in heights:
            if need(height, width) <= SHARE * chip.vmem_bytes:
                return Plan(height, width, need(height, width) + SPARE_BYTES)
    least = need(heights[-1], _cuts(columns, chip.cores)[-1]) / 2**20
    most = SHARE * chip.vmem_bytes / 2**20
    raise ValueError(f"{what} needs {least:.1f} MiB of VMEM in the smallest tiles, has {most:.1f}")


def _plan_rows(R: int, K: int, N: int, chip: Chip) -> Plan:
    """Of [R, K] times a matrix -> [R, N]: two tiles of rows, two of a matrix, two of results."""

    def need(height: int, width: int) -> int:
        return 4 * (height * K + K * width + height * width)

    return _fit(R, N, chip, need, f"a product with matrices of {K} x {N}")


def _plan_groups(R: int, D: int, F: int, chip: Chip) -> Plan:
    """Of drhs, the wider side cut: two tiles of x and of g, two results and their float32 sums."""
    whole = min(D, F)

    def need(height: int, width: int) -> int:
        return 4 * height * (width + whole) + (4 + 4) * width * whole

    return _fit(R, max(D, F), chip, need, f"a gradient of matrices of {D} x {F}")


def grouped_matmul(
    x_RD: jax.Array,
    w_EDF: jax.Array,
    rows_E: jax.Array,
    *,
    chip: Chip | None = None,
    interpret: Any = False,
) -> jax.Array:
    """y[R, F], as `glm45_jax.kernels.grouped_matmul`; rows past sum(rows_E) give zeros and get
    none.

    bfloat16 in and out, float32 sums. Deterministic, backward too. A NaN reaches its own row and
    the gradient of its own group's matrix, no other.
    """
    chip = chip or CHIPS[device().device_kind]
    return _product(x_RD, w_EDF, rows_E, chip, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x_RD, w_EDF, rows_E, chip, interpret):
    return rows_by_matrix(x_RD, w_EDF, rows_E, chip=chip, interpret=interpret)


def _product_fwd(x_RD, w_EDF, rows_E, chip, interpret):
    return _product(x_RD, w_EDF, rows_E, chip, interpret), (x_RD, w_EDF, rows_E)


def _product_bwd(chip, interpret, saved, g_RF):
    x_RD, w_EDF, rows_E = saved
    how = dict(chip=chip, interpret=interpret)
    dx_RD = rows_by_matrix(g_RF, w_EDF, rows_E, transposed=True, **how)
    return dx_RD, rows_by_rows(x_RD, g_RF, rows_E, **how), None


_product.defvjp(_product_fwd, _product_bwd)


def _in_blocks(low: Any, high: Any, height: int, do: Any) -> None:
    """do(start, rows, kept, first) for blocks that cover rows low to high of a tile of `height`: of
    TALL rows while there are as many, of ROWS for the rest.

    A block begins at a multiple of PACKED rows. The last is shifted back to end in the tile. kept,
    [rows, 1]: low to high, each row in one block. first: of the blocks.
    """
    # lax.div: `//` asks which TPU this is of a machine that may have none.
    begin = lax.div(low, PACKED) * PACKED
    small = min(ROWS, height)
    blocks = lax.div(jnp.maximum(high - begin, 0) + small - 1, small)

    def at(start: Any, rows: int) -> None:
        shifted = pl.multiple_of(jnp.minimum(start, height - rows), PACKED)
        row = shifted + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        do(shifted, rows, (row >= jnp.maximum(low, start)) & (row < high), start <= low)

    def loop(begin: Any, rows: int, count: Any) -> None:
        lax.fori_loop(0, count, lambda i, _: at(begin + i * rows, rows), None)

    tall = lax.div(blocks, 2) if height >= TALL else 0
    if height >= TALL:
        loop(begin, TALL, tall)
    loop(begin + tall * TALL, small, blocks - 2 * tall)


@functools.partial(jax.jit, static_argnames=("transposed", "chip", "plan", "interpret"))
def rows_by_matrix(
    x_RK: jax.Array,
    w_EDF: jax.Array,
    rows_E: jax.Array,
    *,
    transposed: bool = False,
    chip: Chip = V5P,
    plan: Plan | None = None,
    interpret: Any = False,
) -> jax.Array:
    """x[R, D] · w[E, D, F] -> [R, F], or transposed x[R, F] · w[E, D, F] -> [R, D].

    A tile of rows stays while the groups in it pass by, and each writes its own rows of the result.
    """
    (R, K), N = x_RK.shape, w_EDF.shape[1 if transposed else 2]
    plan = plan or _plan_rows(R, K, N, chip)
    height, width = plan.rows, plan.columns
    visits = lay_visits(rows_E, n_rows=R, height=height, every_group=False)
    E, n_tiles = w_EDF.shape[0], pl.cdiv(N, width)

    def body(group_V, tile_V, load_V, low_V, high_V, slot_V, first_V, last_V, next_V, *refs):
        x, w, y, held, arrived = refs
        n, v = pl.program_id(0), pl.program_id(1)
        group, slot, low, high = group_V[v], slot_V[v], low_V[v], high_V[v]
        mine = group < E

        def fetch(group, slot, do):
            def part(columns: int):  # the last tile may be narrower
                at = pl.ds(n * width, columns)
                source = w.at[group, at, :] if transposed else w.at[group, :, at]
                target = held.at[slot, pl.ds(0, columns), :]
                if not transposed:
                    target = held.at[slot, :, pl.ds(0, columns)]
                do(pltpu.make_async_copy(source, target, arrived.at[slot]))

            last = N - (n_tiles - 1) * width
            if last == width:
                part(width)
            else:
                pl.when(n < n_tiles - 1)(lambda: part(width))
                pl.when(n == n_tiles - 1)(lambda: part(last))

        @pl.when(mine & (first_V[v] == 1))
        def _():
            pl.when(v == 0)(lambda: fetch(group, slot, lambda copy: copy.start()))
            following = next_V[v]
            pl.when(following >= 0)(lambda: fetch(following, 1 - slot, lambda copy: copy.start()))
            fetch(group, slot, lambda copy: copy.wait())

        def write(start, rows, kept, columns, values):
            old = y[pl.ds(start, rows), columns].astype(jnp.float32)
            new = jnp.where(kept, values, old)
            y[pl.ds(start, rows), columns] = new.astype(y.dtype)

        def multiply(start, rows, kept, _):
            for c in range(0, width, WIDE):
                columns = pl.ds(c, min(WIDE, width - c))
                matrix = held[slot, columns, :] if transposed else held[slot, :, columns]
                dims = (((1,), (1 if transposed else 0,)), ((), ()))
                values = lax.dot_general(
                    x[pl.ds(start, rows), :], matrix, dims, preferred_element_type=jnp.float32
                )
                write(start, rows, kept, columns, values)

        def blank(start, rows, kept, _):
            for c in range(0, width, WIDE):
                columns = pl.ds(c, min(WIDE, width - c))
                write(start, rows, kept, columns, jnp.zeros((rows, columns.size), jnp.float32))

        pl.when(mine)(lambda: _in_blocks(low, high, height, multiply))
        pl.when(~mine)(lambda: _in_blocks(low, high, height, blank))

    matrix = (width, K) if transposed else (K, width)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((R, N), x_RK.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=FIELDS,
            grid=(n_tiles, visits.count),
            in_specs=[
                pl.BlockSpec((height, K), lambda n, v, *t: (t[2][v], 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((height, width), lambda n, v, *t: (t[1][v], n)),
            scratch_shapes=[
                pltpu.VMEM((2, *matrix), w_EDF.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=plan.vmem_bytes
        ),
        cost_estimate=_cost(R, K, N, E, x_RK.dtype.itemsize),
        interpret=interpret,
    )(*visits.table(), x_RK, w_EDF)


def _cost(R: int, K: int, N: int, E: int, size: int) -> pl.CostEstimate:
    """Of all rows, each operand moved once."""
    moved = size * (R * K + R * N + E * K * N)
    return pl.CostEstimate(flops=2 * R * K * N, bytes_accessed=moved, transcendentals=0)


@functools.partial(jax.jit, static_argnames=("chip", "plan", "interpret"))
def rows_by_rows(
    x_RD: jax.Array,
    g_RF: jax.Array,
    rows_E: jax.Array,
    *,
    chip: Chip = V5P,
    plan: Plan | None = None,
    interpret: Any = False,
) -> jax.Array:
    """dw[E, D, F]: for each group, its rows of x transposed times its rows of g; zeros for an empty
    one.

    Sums are float32 in VMEM over a group's visits. Rows of neighbours are zeroed in x and in g.
    """
    (R, D), F, E = x_RD.shape, g_RF.shape[1], rows_E.shape[0]
    plan = plan or _plan_groups(R, D, F, chip)
    height, width = plan.rows, plan.columns
    d, f = (width, F) if D >= F else (D, width)  # of a tile; the side that is not cut has one
    visits = lay_visits(rows_E, n_rows=R, height=height, every_group=True)

    def body(group_V, tile_V, load_V, low_V, high_V, slot_V, first_V, last_V, next_V, *refs):
        x, g, dw, sums = refs
        v = pl.program_id(1)
        low, high, opens = low_V[v], high_V[v], first_V[v] == 1

        def add(start, rows, kept, first):
            fresh = opens & first  # nothing to add to yet: a pass less than to zero the sums
            a = jnp.where(kept, x[pl.ds(start, rows), :].astype(jnp.float32), 0).astype(x.dtype)
            for c in range(0, f, WIDE):
                columns = pl.ds(c, min(WIDE, f - c))
                b = g[pl.ds(start, rows), columns].astype(jnp.float32)
                b = jnp.where(kept, b, 0).astype(g.dtype)
                dims = (((0,), (0,)), ((), ()))
                more = lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
                sums[:, columns] = jnp.where(fresh, more, sums[:, columns] + more)

        _in_blocks(low, high, height, add)

        @pl.when(last_V[v] == 1)
        def _():
            dw[0] = jnp.where(high > low, sums[...], 0).astype(dw.dtype)

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((E, D, F), x_RD.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=FIELDS,
            grid=(pl.cdiv(max(D, F), width), visits.count),
            in_specs=[
                pl.BlockSpec((height, d), lambda n, v, *t: (t[2][v], n if D >= F else 0)),
                pl.BlockSpec((height, f), lambda n, v, *t: (t[2][v], 0 if D >= F else n)),
            ],
            out_specs=pl.BlockSpec(
                (1, d, f), lambda n, v, *t: (t[0][v], n, 0) if D >= F else (t[0][v], 0, n)
            ),
            scratch_shapes=[pltpu.VMEM((d, f), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=plan.vmem_bytes
        ),
        cost_estimate=_cost(R, D, F, E, x_RD.dtype.itemsize),
        interpret=interpret,
    )(*visits.table(), x_RD, g_RF)
