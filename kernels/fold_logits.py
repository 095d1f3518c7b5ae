"""Fold one tile of logits, made by a matmul, into the running statistics of its rows.

    state  [7, N]  m, the running max; s, sum e^(z - m); the target's logit; u, sum (z - m) e^(z - m); s without the
                   target's own term; f at the target; e^(m before - m), the factor for sums over earlier tiles

A program holds BLOCK_V columns of its rows in registers: many loads are in flight, each logit is read once, and there are
two reductions (three with the entropy), because the target's own logit is loaded apart. A tile wider than BLOCK_V is
folded piece by piece; with `out` it must fit. No atomics: the same inputs give the same bits.

    tile   [N, C]  fp32, hidden @ weight[FIRST : FIRST + C].T
    out    [N, C]  e^(z - m) f, 0 at the target, in the dtype of the next matmul; f is the softcap's derivative, or 1
    argmax [N]     int64, a column of the running max
    mass   [N, T]  log of sum e^z f over WIDTH columns; independent of m, which later tiles may raise
"""

import triton
import triton.language as tl

from .tiles import finish_logits, guarded_exp


@triton.jit
def fold_logits_kernel(
    tile_ptr,
    bias_ptr,
    target_ptr,
    state_ptr,
    argmax_ptr,
    mass_ptr,
    out_ptr,
    N,
    V,
    FIRST,  # vocabulary id of the tile's first column
    C,
    STATE,  # rows of a statistic in state_ptr
    stride_tn,
    stride_on,
    stride_mn,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    WIDTH: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MASS: tl.constexpr,
    HAS_OUT: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    p_row = tile_ptr + o_n[:, None] * stride_tn
    b_before = tl.load(state_ptr + o_n, mask=m_n, other=0.0)
    b_max = b_before
    b_sum = tl.load(state_ptr + STATE + o_n, mask=m_n, other=0.0)
    b_off = tl.load(state_ptr + 4 * STATE + o_n, mask=m_n, other=0.0)
    b_argmax = tl.load(argmax_ptr + o_n, mask=m_n, other=0)
    if HAS_ENTROPY:
        b_u = tl.load(state_ptr + 3 * STATE + o_n, mask=m_n, other=0.0)
    o_y = tl.load(target_ptr + o_n, mask=m_n, other=-1)[:, None] - FIRST
    b_zy = tl.load(p_row + o_y, mask=m_n[:, None] & (o_y >= 0) & (o_y < C), other=0.0)
    b_zy, b_fy = finish_logits(b_zy, bias_ptr, FIRST + o_y, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, HAS_BIAS, HAS_SOFTCAP)
    for start in range(0, C, BLOCK_V):
        o_c = start + tl.arange(0, BLOCK_V)[None, :]
        m_tile = m_n[:, None] & (o_c < C)
        b_z = tl.load(p_row + o_c, mask=m_tile, other=0.0)
        b_z, b_f = finish_logits(
            b_z, bias_ptr, FIRST + o_c, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, HAS_BIAS, HAS_SOFTCAP
        )
        b_z = tl.where(m_tile, b_z, float("-inf"))
        b_highest, b_at = tl.max(b_z, axis=1, return_indices=True)
        b_argmax = tl.where(b_highest > b_max, FIRST + start + b_at, b_argmax)
        b_new = tl.maximum(b_max, b_highest)
        b_shrink = guarded_exp(b_max, b_new)
        if HAS_ENTROPY:
            b_u = b_shrink * (b_u + tl.where(b_max == float("-inf"), 0.0, b_max - b_new) * b_sum)
        b_max = b_new
        b_e = guarded_exp(b_z, b_max[:, None])
        if HAS_MASS:
            b_mass = tl.sum(tl.reshape(b_e * b_f, (BLOCK_N, BLOCK_V // WIDTH, WIDTH)), axis=2)
            o_t = tl.arange(0, BLOCK_V // WIDTH)[None, :]
            p_mass = mass_ptr + o_n[:, None] * stride_mn + (FIRST + start) // WIDTH + o_t
            tl.store(p_mass, tl.log(b_mass) + b_max[:, None], mask=m_n[:, None] & (start + o_t * WIDTH < C))
        m_y = o_c == o_y
        b_e = tl.where(m_y, 0.0, b_e)
        b_part = tl.sum(b_e, axis=1)
        # the target's own term, where it lies in this piece
        b_ey = tl.where((o_y >= start) & (o_y < start + BLOCK_V) & (o_y < C), guarded_exp(b_zy, b_max[:, None]), 0.0)
        b_off = b_off * b_shrink + b_part
        b_sum = b_sum * b_shrink + b_part + tl.sum(b_ey, axis=1)
        if HAS_ENTROPY:
            b_u += tl.sum(tl.where(b_e == 0.0, 0.0, (b_z - b_max[:, None]) * b_e), axis=1)
            b_u += tl.sum(tl.where(b_ey == 0.0, 0.0, (b_zy - b_max[:, None]) * b_ey), axis=1)
        if HAS_OUT:
            p_out = out_ptr + o_n[:, None] * stride_on + o_c
            tl.store(p_out, (b_e * b_f).to(out_ptr.dtype.element_ty), mask=m_tile)
    tl.store(argmax_ptr + o_n, b_argmax, mask=m_n)
    tl.store(state_ptr + o_n, b_max, mask=m_n)
    tl.store(state_ptr + STATE + o_n, b_sum, mask=m_n)
    tl.store(state_ptr + 4 * STATE + o_n, b_off, mask=m_n)
    if HAS_ENTROPY:
        tl.store(state_ptr + 3 * STATE + o_n, b_u, mask=m_n)
    m_y = m_n[:, None] & (o_y >= 0) & (o_y < C)
    tl.store(state_ptr + 2 * STATE + o_n[:, None], b_zy, mask=m_y)
    tl.store(state_ptr + 5 * STATE + o_n[:, None], b_fy, mask=m_y)
    tl.store(state_ptr + 6 * STATE + o_n, guarded_exp(b_before, b_max), mask=m_n)


@triton.jit
def rescale_rows_kernel(
    sums_ptr,  # [N, D], contiguous
    shrink_ptr,  # [N]
    N,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sums *= shrink; rows whose maximum did not move are neither read nor written."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_shrink = tl.load(shrink_ptr + o_n, mask=o_n < N, other=1.0)
    m_moved = (b_shrink != 1.0)[:, None] & (o_d < D)[None, :]
    p_sums = sums_ptr + o_n[:, None] * D + o_d[None, :]
    tl.store(p_sums, tl.load(p_sums, mask=m_moved, other=0.0) * b_shrink[:, None], mask=m_moved)
