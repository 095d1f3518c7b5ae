"""The backward of the lm-head for a list of (row, vocabulary tile) blocks; all other blocks are left out.

Blocks are sorted by tile, then by row: the rows of tile t are rows[offset[t] : offset[t + 1]]. A launch takes blocks FIRST to LAST,
as many as the workspace holds. A tile cut by that range is carried to the next launch in float32. weight_ptr is the first row of tile FIRST_TILE.

    gathered_dlogits   dz[i] = dlogits of block i; recomputes the matmul for gathered rows       [blocks, TILE]
    gathered_dweight   dW[tile] = sum over its blocks of dz[i]^T h[row i], written once          [V, D]
    gathered_product   product[i] = dz[i] W[tile]                                                [blocks, D] fp32
    add_products       dh[n] += the products of its blocks, in the order of the tiles            [N, D] fp32

With SCATTERED, dz is the tiles' part of the whole gradient, zero where no block was kept, [N, tiles * TILE]: gathered_dlogits writes
its blocks into their rows, gathered_dweight reads them there, and dh is one matmul.

No atomics: one program adds the products of a row, through a list of its blocks, so the same inputs give the same bits.
"""

import triton
import triton.language as tl

from .head_backward import dlogits
from .tiles import finish_logits


@triton.jit
def _blocks(offset_ptr, i_t, FIRST, LAST):
    """First and last block of a tile among FIRST to LAST."""
    start = tl.maximum(tl.load(offset_ptr + i_t), FIRST)
    stop = tl.minimum(tl.load(offset_ptr + i_t + 1), LAST)
    return start, stop


@triton.jit
def _place(o_i, o_n, i_t, FIRST_TILE, FIRST, stride_zn, TILE: tl.constexpr, SCATTERED: tl.constexpr):
    """Where a block's first column lies in dz."""
    if SCATTERED:
        return o_n * stride_zn + (i_t - FIRST_TILE) * TILE
    else:
        return (o_i - FIRST) * TILE


@triton.jit
def gathered_dlogits_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    rows_ptr,
    offset_ptr,
    target_ptr,
    logp_ptr,
    row_max_ptr,
    row_sum_ptr,
    argmax_ptr,
    grad_logp_ptr,
    out_ptr,
    FIRST_TILE,
    FIRST,
    LAST,
    V,
    D,
    stride_hn,
    stride_wv,
    stride_zn,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SCATTERED: tl.constexpr,
    ACC: tl.constexpr,
):
    i_t = FIRST_TILE + tl.program_id(1)
    start, stop = _blocks(offset_ptr, i_t, FIRST, LAST)
    o_i = start + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_i = o_i < stop
    if start + tl.program_id(0) * BLOCK_N < stop:
        o_c = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
        o_v = i_t * TILE + o_c
        o_n = tl.load(rows_ptr + o_i, mask=m_i, other=0)
        p_hidden = hidden_ptr + o_n * stride_hn
        p_weight = weight_ptr + (o_v - FIRST_TILE * TILE).to(tl.int64) * stride_wv
        o_d = tl.arange(0, BLOCK_D)
        b_z = tl.zeros((BLOCK_N, BLOCK_V), dtype=ACC)
        for d in range(0, D, BLOCK_D):
            m_d = o_d < D - d
            b_h = tl.load(p_hidden[:, None] + (d + o_d)[None, :], mask=m_i[:, None] & m_d[None, :], other=0.0)
            b_w = tl.load(p_weight[None, :] + (d + o_d)[:, None], mask=(o_v < V)[None, :] & m_d[:, None], other=0.0)
            b_z = tl.dot(b_h, b_w, b_z, input_precision="ieee", out_dtype=ACC)
        b_z, b_softcap_grad = finish_logits(
            b_z, bias_ptr, o_v[None, :], V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, HAS_BIAS, HAS_SOFTCAP
        )
        b_max = tl.load(row_max_ptr + o_n, mask=m_i, other=0.0)[:, None]
        b_sum = tl.load(row_sum_ptr + o_n, mask=m_i, other=1.0)[:, None]
        b_c = tl.load(grad_logp_ptr + o_n, mask=m_i, other=0.0)[:, None]
        b_target = tl.load(target_ptr + o_n, mask=m_i, other=-1)[:, None]
        b_argmax = tl.load(argmax_ptr + o_n, mask=m_i, other=-1)[:, None]
        b_logp_y = tl.load(logp_ptr + o_n, mask=m_i, other=0.0)[:, None]
        _, _, b_dz = dlogits(b_z, o_v, b_max, b_sum, b_c, b_target, b_argmax, b_logp_y)
        b_dz = b_dz * b_softcap_grad * (LOGIT_SCALE / TEMPERATURE)
        o_z = _place(o_i, o_n, i_t, FIRST_TILE, FIRST, stride_zn, TILE, SCATTERED)
        p_out = out_ptr + o_z[:, None] + o_c[None, :]
        tl.store(p_out, b_dz.to(out_ptr.dtype.element_ty), mask=m_i[:, None])


@triton.jit
def gathered_dweight_kernel(
    hidden_ptr,
    dz_ptr,
    rows_ptr,
    offset_ptr,
    carry_in_ptr,
    carry_out_ptr,
    d_weight_ptr,
    d_bias_ptr,
    FIRST_TILE,
    FIRST,
    LAST,
    V,
    D,
    stride_hn,
    stride_wv,
    stride_zn,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCATTERED: tl.constexpr,
    ACC: tl.constexpr,
):
    i_t = FIRST_TILE + tl.program_id(0)
    start, stop = _blocks(offset_ptr, i_t, FIRST, LAST)
    carried = tl.load(offset_ptr + i_t) < FIRST
    carries = tl.load(offset_ptr + i_t + 1) > LAST
    o_c = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    o_v = i_t * TILE + o_c
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_carry = o_c[:, None] * D + o_d[None, :]
    b_dw = tl.load(carry_in_ptr + o_carry, mask=(o_d < tl.where(carried, D, 0))[None, :], other=0.0)
    b_db = tl.zeros((BLOCK_V,), dtype=ACC)
    for i in range(start, stop, BLOCK_N):
        o_i = i + tl.arange(0, BLOCK_N)
        m_i = o_i < stop
        if SCATTERED:  # noqa: SIM108 - a branch of the compiler, not a value
            o_n = tl.load(rows_ptr + o_i, mask=m_i, other=0)
        else:  # read when it is needed: earlier, it costs a register too many on sm_100
            o_n = o_i
        o_z = _place(o_i, o_n, i_t, FIRST_TILE, FIRST, stride_zn, TILE, SCATTERED)
        b_dz = tl.load(dz_ptr + o_z[:, None] + o_c[None, :], mask=m_i[:, None], other=0.0)
        if HAS_WEIGHT:
            if not SCATTERED:
                o_n = tl.load(rows_ptr + o_i, mask=m_i, other=0)
            p_hidden = hidden_ptr + (o_n * stride_hn)[:, None] + o_d[None, :]
            b_h = tl.load(p_hidden, mask=m_i[:, None] & m_d[None, :], other=0.0)
            b_dw = tl.dot(tl.trans(b_dz), b_h, b_dw, input_precision="ieee", out_dtype=ACC)
        if HAS_BIAS:
            b_db += tl.sum(b_dz.to(ACC), axis=0)
    if HAS_WEIGHT:
        if carries:
            tl.store(carry_out_ptr + o_carry, b_dw, mask=m_d[None, :])
        else:
            p_weight = d_weight_ptr + (o_v.to(tl.int64) * stride_wv)[:, None] + o_d[None, :]
            tl.store(p_weight, b_dw.to(d_weight_ptr.dtype.element_ty), mask=(o_v < V)[:, None] & m_d[None, :])
    if HAS_BIAS:  # noqa: SIM102 - a constant, apart. float32, so what a former launch has written is the carry
        if tl.program_id(1) == 0:
            b_db += tl.load(d_bias_ptr + o_v, mask=o_v < tl.where(carried, V, 0), other=0.0)
            tl.store(d_bias_ptr + o_v, b_db, mask=o_v < V)


@triton.jit
def gathered_product_kernel(
    dz_ptr,
    weight_ptr,
    offset_ptr,
    product_ptr,
    FIRST_TILE,
    FIRST,
    LAST,
    V,
    D,
    stride_wv,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    i_t = FIRST_TILE + tl.program_id(1)
    start, stop = _blocks(offset_ptr, i_t, FIRST, LAST)
    o_i = start - FIRST + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_i = o_i < stop - FIRST
    if start + tl.program_id(0) * BLOCK_N < stop:
        o_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_product = tl.zeros((BLOCK_N, BLOCK_D), dtype=ACC)
        for c in range(0, TILE, BLOCK_V):
            o_c = c + tl.arange(0, BLOCK_V)
            o_v = i_t * TILE + o_c
            b_dz = tl.load(dz_ptr + o_i[:, None] * TILE + o_c[None, :], mask=m_i[:, None], other=0.0)
            p_weight = weight_ptr + ((o_v - FIRST_TILE * TILE).to(tl.int64) * stride_wv)[:, None] + o_d[None, :]
            b_w = tl.load(p_weight, mask=(o_v < V)[:, None] & m_d[None, :], other=0.0)
            b_product = tl.dot(b_dz, b_w, b_product, input_precision="ieee", out_dtype=ACC)
        tl.store(product_ptr + o_i[:, None] * D + o_d[None, :], b_product, mask=m_i[:, None] & m_d[None, :])


@triton.jit
def add_products_kernel(
    product_ptr,
    place_ptr,  # products sorted by row
    row_start_ptr,  # [N + 1], where a row begins in it
    d_hidden_ptr,
    D,
    BLOCK_D: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(row_start_ptr + i_n), tl.load(row_start_ptr + i_n + 1)
    if start < stop:
        o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        p_d_hidden = d_hidden_ptr + i_n * D + o_d
        b_sum = tl.load(p_d_hidden, mask=m_d, other=0.0)
        for i in range(start, stop):
            b_sum += tl.load(product_ptr + tl.load(place_ptr + i) * D + o_d, mask=m_d, other=0.0)
        tl.store(p_d_hidden, b_sum, mask=m_d)
