"""The kernel for Hopper that both operations are: a product over rows, tile by tile.

    out_ij = addend_ij + Σ_g f( Σ_k a_gki b_gkj ),     f(x) = x or x²

Two blocks of threads, a cluster, own a 256 x `width` tile of one layer, 128 rows each. A block is
three warpgroups. The last one only copies: the copy engine (TMA) brings 64 rows of both operands at
a time into a ring of slots in shared memory, swizzled as the tensor cores want them, and fills with
zeros what lies outside the arrays; b's columns are the same for both blocks, which fetch half each
and send it to both. The other two warpgroups own 64 rows of the tile each and multiply (wgmma),
both operands from shared memory, sums in float32 registers; a slot goes back when the product after
it has been issued. With f(x) = x² a second set of registers sums the squares of finished groups, so
no group's product leaves the registers. At the end the addend's tile passes through shared memory
in strips, is added to in registers, and leaves by the copy engine again.

Masked rows: 64 rows at a time that are all kept go straight to the tensor cores; others are read
into registers, replaced by zeros where masked (in both operands: zero times NaN is NaN), and
written back before either warpgroup multiplies.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

WARPGROUPS = 2  # that multiply; a third copies
ROWS = 64  # of the tile to a warpgroup
BLOCKS = 2  # to a cluster
HEIGHT = WARPGROUPS * ROWS  # of a block's part of a tile
TILE_HEIGHT = BLOCKS * HEIGHT
DEPTH = 64  # rows of the operands to a slot
STRIP = 32  # columns of the addend at a time
SHARED_BYTES = 192 * 1024  # for the ring; strips and barriers take 33 KiB of the other 35
FLOAT32 = jnp.float32


def contract(
    a: Float[Array, "layers groups k m"],
    b: Float[Array, "layers groups k n"],
    addend: Float[Array, "layers m n"],
    *,
    tiles: Sequence[tuple[int, int]],
    width: int,
    is_squared: bool = False,
    keep: Bool[Array, "layers k"] | None = None,
) -> Float[Array, "layers m n"]:
    """Run the kernel; what is in no tile is undefined.

    m or n that is no multiple of 64, or k that is none of 8, costs a padded copy of the operands.

    Args:
        a: the left operand, in bfloat16 or float16.
        b: the right operand, in the dtype of `a`.
        addend: what the sums are added to, in float32.
        tiles: (row, column) of the tiles to compute, in units of 256 and `width`.
        width: 128, 192 or 256; 128 when squared, where a thread holds two sums.
        is_squared: whether f(x) is x², and not x.
        keep: False for rows whose contents must not matter; not with several groups.

    Returns:
        The new sums, in float32.
    """
    (layers, _, k, _), (m, n) = a.shape, addend.shape[1:]
    if 0 in (*a.shape, *addend.shape):  # there is nothing to copy, nor to sum
        return addend
    a, b = _pad(a, {2: 8, 3: 64}), _pad(b, {2: 8, 3: 64})
    addend = _pad(addend, {1: 64, 2: 64})
    depth = pl.cdiv(k, DEPTH)
    optional = {}
    if keep is not None:
        keep = _pad(keep.astype(jnp.int32), {1: DEPTH})
        whole = jnp.all(keep.reshape(layers, depth, DEPTH) != 0, axis=-1)
        optional |= {"keep": keep, "is_whole": whole.astype(jnp.int32)}
    rows, columns = (jnp.asarray(index, jnp.int32) for index in zip(*tiles, strict=True))

    def body(rows, columns, *refs):
        extra = dict(zip(optional, refs, strict=False))
        refs = refs[len(optional) :]
        _tile(rows, columns, refs, extra, is_squared=is_squared)

    slots = SHARED_BYTES // (DEPTH * (HEIGHT + width) * a.dtype.itemsize)
    call = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(addend.shape, FLOAT32),
        grid=(len(tiles), layers),
        grid_names=("tile", "layer"),
        cluster=(BLOCKS,),
        cluster_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            _swizzled((slots, DEPTH, HEIGHT), a.dtype),
            _swizzled((slots, DEPTH, width), a.dtype),
            _swizzled((WARPGROUPS, 2, ROWS, STRIP), FLOAT32),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            plgpu.ClusterBarrier(
                collective_axes=("block",), num_arrivals=WARPGROUPS, num_barriers=slots
            ),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            plgpu.Barrier(num_barriers=WARPGROUPS * 2),
        ],
    )
    return call(rows, columns, *optional.values(), a, b, addend)[:, :m, :n]


def _pad(x: Array, multiples: dict[int, int]) -> Array:
    """Return zeros at the end of some axes; the same array where there is nothing to add."""
    amounts = [(0, -size % multiples.get(axis, 1)) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, amounts) if any(end for _, end in amounts) else x


def _swizzled(shape: tuple[int, ...], dtype):
    """Reserve shared memory in rows of 128 bytes, swizzled as tensor cores and TMA both know."""
    columns = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _loop(number, step: Callable[[Array], None]) -> None:
    """Run `step` for 0 ... number - 1, counted in int32 whatever the width of JAX's integers."""
    lax.fori_loop(jnp.int32(0), jnp.int32(number), lambda i, _: step(i), None)


def _tile(rows, columns, refs, extra, *, is_squared):
    """Run one block of threads, which computes its part of one tile of one layer."""
    a, b, addend, out, *shared = refs
    a_ring, b_ring, strips, filled, emptied, cleaned, ready = shared
    tile, layer = lax.axis_index("tile"), lax.axis_index("layer")
    warpgroup = lax.axis_index("warpgroup")
    groups, k = a.shape[1:3]
    slots, _, width = b_ring.shape
    depth = pl.cdiv(k, DEPTH)
    steps = groups * depth
    last = jnp.int32(max(steps - slots, 0))
    part = rows[tile] * jnp.int32(BLOCKS) + lax.axis_index("block")
    top = pl.multiple_of(part * jnp.int32(HEIGHT), HEIGHT)
    left = pl.multiple_of(columns[tile] * jnp.int32(width), 64)

    def slot_of(step):
        return lax.rem(step, jnp.int32(slots))

    @pl.when(warpgroup == WARPGROUPS)
    def _copy():
        # Copying needs few registers: those given up are what the sums of the others live in.
        plgpu.set_max_registers(40, action="decrease")

        def step(number):
            slot = slot_of(number)

            @pl.when(number >= slots)
            def _():
                plgpu.barrier_wait(emptied.at[slot])

            group, block = lax.div(number, jnp.int32(depth)), lax.rem(number, jnp.int32(depth))
            there = (layer, group, pl.ds(block * jnp.int32(DEPTH), DEPTH))
            plgpu.copy_gmem_to_smem(
                a.at[*there, pl.ds(top, HEIGHT)], a_ring.at[slot], filled.at[slot]
            )
            plgpu.copy_gmem_to_smem(
                b.at[*there, pl.ds(left, width)],
                b_ring.at[slot],
                filled.at[slot],
                collective_axes="block",
            )

        _loop(steps, step)
        # The other block still reports slots as empty: this one must not end before it has.
        _loop(min(steps, slots), lambda i: plgpu.barrier_wait(emptied.at[slot_of(last + i)]))

    @pl.when(warpgroup < WARPGROUPS)
    def _multiply():
        plgpu.set_max_registers(232, action="increase")
        mine = pl.ds(warpgroup * jnp.int32(ROWS), ROWS)
        number_of_strips = width // STRIP

        def strip_at(ref, number):
            at = pl.ds(top + warpgroup * jnp.int32(ROWS), ROWS), pl.ds(left + number * STRIP, STRIP)
            return ref.at[layer, *at]

        def load_strip(number):
            barrier = ready.at[warpgroup * jnp.int32(2) + number % 2]
            plgpu.copy_gmem_to_smem(
                strip_at(addend, number), strips.at[warpgroup, number % 2], barrier
            )

        # Two strips are under way from the start: they arrive while the products run.
        for number in range(2):
            load_strip(number)

        def group_product(group):
            def multiply(sums):
                def step(block):
                    number = group * jnp.int32(depth) + block
                    slot = slot_of(number)
                    plgpu.barrier_wait(filled.at[slot])
                    if "keep" in extra:
                        clean(block, slot)
                    left_operand = a_ring.at[slot, :, mine].transpose((1, 0))
                    plgpu.wgmma(sums, left_operand, b_ring.at[slot])
                    plgpu.wgmma_wait(1)  # all but the last product are done: their slots are free

                    @pl.when(block > 0)
                    def _():
                        plgpu.barrier_arrive(emptied.at[slot_of(number - jnp.int32(1))])

                _loop(depth, step)
                product = sums[...]  # waits for the last product
                plgpu.barrier_arrive(emptied.at[slot_of((group + 1) * jnp.int32(depth) - 1)])
                return product

            return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, width), FLOAT32))

        def clean(block, slot):
            @pl.when(extra["is_whole"][layer, block] == 0)
            def _():
                row = extra["keep"][layer, pl.ds(block * jnp.int32(DEPTH), DEPTH)]
                row = plgpu.layout_cast(row, plgpu.Layout.WGMMA.reduce(1))

                def zero_masked(ref):
                    x = plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA)
                    is_kept = lax.broadcast_in_dim(row, x.shape, [0]) != 0
                    ref[...] = jnp.where(is_kept, x, jnp.zeros_like(x))

                zero_masked(a_ring.at[slot, :, mine])
                for first in range(0, width, WARPGROUPS * ROWS):
                    start = first + warpgroup * jnp.int32(ROWS)

                    # The last columns of an odd number belong to the first warpgroup alone.
                    @pl.when(start < width)
                    def _(start=start):
                        zero_masked(b_ring.at[slot, :, pl.ds(start, ROWS)])

                plgpu.commit_smem()
                plgpu.barrier_arrive(cleaned)
                plgpu.barrier_wait(cleaned)

        if is_squared:
            zeros = plgpu.layout_cast(jnp.zeros((ROWS, width), FLOAT32), plgpu.Layout.WGMMA)

            def add_square(group, total):
                product = group_product(group)
                return total + product * product

            total = lax.fori_loop(jnp.int32(0), jnp.int32(groups), add_square, zeros)
        else:
            total = group_product(jnp.int32(0))

        for number in range(number_of_strips):
            strip = strips.at[warpgroup, number % 2]
            plgpu.barrier_wait(ready.at[warpgroup * jnp.int32(2) + number % 2])
            old = plgpu.layout_cast(strip[...], plgpu.Layout.WGMMA)
            part = total[:, number * STRIP : (number + 1) * STRIP]
            strip[...] = old + part
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(strip, strip_at(out, number))
            if number + 2 < number_of_strips:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                load_strip(number + 2)
        plgpu.wait_smem_to_gmem(0)
