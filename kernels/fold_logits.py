"""Fold one tile of logits, made by a matmul, into the running statistics of its rows.

    state  [7, N]  m, the running max; s, sum e^(z - m); the target's logit; u, sum (z - m) e^(z - m); s without the
                   target's own term; f at the target; e^(m before - m), the factor for sums over earlier tiles

One program owns BLOCK_N rows and reads the tile twice, first for the maximum: the second pass then writes exponentials
that are final for this tile, and the tile is still in L2. No atomics: the same inputs give the same bits.

    tile   [N, C]  fp32, hidden @ weight[FIRST : FIRST + C].T
    out    [N, C]  e^(z - m) f, 0 at the target, in the dtype of the next matmul; f is the softcap's derivative, or 1
    argmax [N]     int64, column of the running max; of equal logits in one block the last
    mass   [N, T]  log of sum e^z f over BLOCK_V columns; independent of m, which later tiles may raise
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
    b_target = tl.load(target_ptr + o_n, mask=m_n, other=-1)
    b_old = tl.load(state_ptr + o_n, mask=m_n, other=0.0)
    b_max = b_old
    b_argmax = tl.load(argmax_ptr + o_n, mask=m_n, other=0)
    for start in range(0, C, BLOCK_V):
        o_c = start + tl.arange(0, BLOCK_V)
        m_tile = m_n[:, None] & (o_c < C)[None, :]
        b_z = tl.load(tile_ptr + o_n[:, None] * stride_tn + o_c[None, :], mask=m_tile, other=0.0)
        b_z, _ = finish_logits(b_z, bias_ptr, FIRST + o_c, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, HAS_BIAS, HAS_SOFTCAP)
        b_z = tl.where(m_tile, b_z, float("-inf"))
        b_highest = tl.max(b_z, axis=1)
        b_column = FIRST + tl.max(tl.where(b_z == b_highest[:, None], o_c[None, :], 0), axis=1)
        b_argmax = tl.where(b_highest > b_max, b_column, b_argmax)
        b_max = tl.maximum(b_max, b_highest)
    tl.store(argmax_ptr + o_n, b_argmax, mask=m_n)

    b_shrink = guarded_exp(b_old, b_max)
    b_sum = tl.load(state_ptr + STATE + o_n, mask=m_n, other=0.0)
    b_logit = tl.load(state_ptr + 2 * STATE + o_n, mask=m_n, other=0.0)
    b_off = tl.load(state_ptr + 4 * STATE + o_n, mask=m_n, other=0.0) * b_shrink
    if HAS_ENTROPY:
        b_u = tl.load(state_ptr + 3 * STATE + o_n, mask=m_n, other=0.0)
        b_u = b_shrink * (b_u + tl.where(b_old == float("-inf"), 0.0, b_old - b_max) * b_sum)
    if HAS_OUT:
        b_softcap_grad_y = tl.load(state_ptr + 5 * STATE + o_n, mask=m_n, other=1.0)
    b_sum = b_sum * b_shrink
    for start in range(0, C, BLOCK_V):
        o_c = start + tl.arange(0, BLOCK_V)
        m_tile = m_n[:, None] & (o_c < C)[None, :]
        b_z = tl.load(tile_ptr + o_n[:, None] * stride_tn + o_c[None, :], mask=m_tile, other=0.0)
        b_z, b_softcap_grad = finish_logits(
            b_z, bias_ptr, FIRST + o_c, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, HAS_BIAS, HAS_SOFTCAP
        )
        b_z = tl.where(m_tile, b_z, float("-inf"))
        b_e = guarded_exp(b_z, b_max[:, None])
        m_y = (FIRST + o_c)[None, :] == b_target[:, None]
        b_logit += tl.sum(tl.where(m_y & m_tile, b_z, 0.0), axis=1)
        b_sum += tl.sum(b_e, axis=1)
        b_off += tl.sum(tl.where(m_y, 0.0, b_e), axis=1)
        if HAS_ENTROPY:
            b_u += tl.sum(tl.where(b_e == 0.0, 0.0, (b_z - b_max[:, None]) * b_e), axis=1)
        if HAS_MASS:
            b_mass = tl.log(tl.sum(b_e * b_softcap_grad, axis=1)) + b_max
            tl.store(mass_ptr + o_n * stride_mn + (FIRST + start) // BLOCK_V, b_mass, mask=m_n)
        if HAS_OUT:
            b_softcap_grad_y += tl.sum(tl.where(m_y & m_tile, b_softcap_grad - 1.0, 0.0), axis=1)
            b_out = tl.where(m_y, 0.0, b_e * b_softcap_grad)
            p_out = out_ptr + o_n[:, None] * stride_on + o_c[None, :]
            tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_tile)
    tl.store(state_ptr + o_n, b_max, mask=m_n)
    tl.store(state_ptr + STATE + o_n, b_sum, mask=m_n)
    tl.store(state_ptr + 2 * STATE + o_n, b_logit, mask=m_n)
    tl.store(state_ptr + 4 * STATE + o_n, b_off, mask=m_n)
    if HAS_ENTROPY:
        tl.store(state_ptr + 3 * STATE + o_n, b_u, mask=m_n)
    if HAS_OUT:
        tl.store(state_ptr + 6 * STATE + o_n, b_shrink, mask=m_n)
        tl.store(state_ptr + 5 * STATE + o_n, b_softcap_grad_y, mask=m_n)
