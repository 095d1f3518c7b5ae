"""Per-token log-probabilities of an lm_head, without the logits.

    logp[n] = (z[n, y_n] - m[n]) - log s[n],    m = max_v z[n, v],    s = sum_v exp(z[n, v] - m[n])      (nats)

A program owns BLOCK_N rows and one of S vocabulary ranges. It walks its range with the statistics of its rows in
registers and writes them once; `merge_splits_kernel` joins the ranges. No atomics and no locks, so the same inputs
give the same bits.

    hidden  [N, D]      bf16, fp16, fp32 (fp64 when interpreted); unit stride in D
    weight  [V, D]      the dtype of hidden; unit stride in D
    target  [N]         int64; a row whose target is outside [0, V) gets NaN and reads nothing foreign
    part    [S, 4, N]   ACC: m, s, the target's logit (0 where another range owns it), u = sum (z - m) e^(z - m)
    argmax  [S, N]      int32: the column of m; of equal logits in one block the last; -1 where all logits are -inf
    mass    [N, T]      ACC: log of sum e^z f over each BLOCK_V columns; f is the softcap's derivative, or 1

Logits exist only in registers. 2NDV FLOP; weight is read N / BLOCK_N times, mostly from L2, because programs of
neighbouring rows run together over the same vocabulary range.
"""

import triton
import triton.language as tl

from .tiles import finish_logits, guarded_exp, logits_tile


@triton.jit
def head_logps_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    part_ptr,
    part_argmax_ptr,
    mass_ptr,
    N,
    V,
    D,
    SPLIT,  # columns per program, a multiple of BLOCK_V
    stride_hn,
    stride_wv,
    stride_mn,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MASS: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    first_column = tl.program_id(1).to(tl.int64) * SPLIT
    o_n = first_row + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_target = tl.load(target_ptr + o_n, mask=m_n, other=-1)
    b_max = tl.full((BLOCK_N,), float("-inf"), ACC)
    b_sum = tl.zeros((BLOCK_N,), ACC)
    b_logit = tl.zeros((BLOCK_N,), ACC)
    b_u = tl.zeros((BLOCK_N,), ACC)
    b_argmax = tl.full((BLOCK_N,), -1, tl.int32)
    for step in range(0, tl.minimum(SPLIT, V - first_column), BLOCK_V):
        start = first_column + step
        o_v = start + tl.arange(0, BLOCK_V)
        b_z = logits_tile(
            hidden_ptr + first_row * stride_hn,
            weight_ptr + start * stride_wv,
            N - first_row,
            V - start,
            D,
            stride_hn,
            stride_wv,
            BLOCK_N,
            BLOCK_V,
            BLOCK_D,
            ACC,
            UPCAST,
        )
        b_z, b_softcap_grad = finish_logits(
            b_z, bias_ptr, o_v[None, :], V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, HAS_BIAS, HAS_SOFTCAP
        )
        b_logit += tl.sum(tl.where(o_v[None, :] == b_target[:, None], b_z, 0.0), axis=1)
        b_highest = tl.max(b_z, axis=1)
        b_column = tl.max(tl.where(b_z == b_highest[:, None], tl.arange(0, BLOCK_V)[None, :], 0), axis=1)
        b_argmax = tl.where(b_highest > b_max, start.to(tl.int32) + b_column, b_argmax)
        b_new = tl.maximum(b_max, b_highest)
        b_shrink = guarded_exp(b_max, b_new)
        b_e = guarded_exp(b_z, b_new[:, None])
        if HAS_ENTROPY:
            moved = tl.where(b_max == float("-inf"), 0.0, b_max - b_new)
            b_u = b_shrink * (b_u + moved * b_sum)
            b_u += tl.sum(tl.where(b_e == 0.0, 0.0, (b_z - b_new[:, None]) * b_e), axis=1)
        b_sum = b_sum * b_shrink + tl.sum(b_e, axis=1)
        b_max = b_new
        if HAS_MASS:
            b_mass = tl.log(tl.sum(b_e * b_softcap_grad, axis=1)) + b_new
            tl.store(mass_ptr + o_n * stride_mn + start // BLOCK_V, b_mass, mask=m_n)
    p_part = part_ptr + tl.program_id(1).to(tl.int64) * 4 * N + o_n
    tl.store(p_part, b_max, mask=m_n)
    tl.store(part_argmax_ptr + tl.program_id(1).to(tl.int64) * N + o_n, b_argmax, mask=m_n)
    tl.store(p_part + N, b_sum, mask=m_n)
    tl.store(p_part + 2 * N, b_logit, mask=m_n)
    if HAS_ENTROPY:
        tl.store(p_part + 3 * N, b_u, mask=m_n)


@triton.jit
def merge_splits_kernel(
    part_ptr,
    part_argmax_ptr,
    target_ptr,
    logp_ptr,
    row_max_ptr,
    row_sum_ptr,
    logit_ptr,
    entropy_ptr,
    argmax_ptr,
    N,
    V,
    S,
    BLOCK_N: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    ACC: tl.constexpr,
):
    """Join the vocabulary ranges: one row of [S] statistics each to logp, m and its column, s, entropy = log s - u / s."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_target = tl.load(target_ptr + o_n, mask=m_n, other=-1)
    b_max = tl.full((BLOCK_N,), float("-inf"), ACC)
    b_argmax = tl.full((BLOCK_N,), -1, tl.int32)
    for i_s in range(0, S):
        b_part_max = tl.load(part_ptr + i_s * 4 * N + o_n, mask=m_n, other=0.0)
        b_argmax = tl.where(b_part_max > b_max, tl.load(part_argmax_ptr + i_s * N + o_n, mask=m_n, other=-1), b_argmax)
        b_max = tl.maximum(b_max, b_part_max)
    b_sum = tl.zeros((BLOCK_N,), ACC)
    b_logit = tl.zeros((BLOCK_N,), ACC)
    b_u = tl.zeros((BLOCK_N,), ACC)
    for i_s in range(0, S):
        p_part = part_ptr + i_s * 4 * N + o_n
        b_part_max = tl.load(p_part, mask=m_n, other=0.0)
        b_part_sum = tl.load(p_part + N, mask=m_n, other=1.0)
        b_shrink = guarded_exp(b_part_max, b_max)
        b_sum += b_part_sum * b_shrink
        b_logit += tl.load(p_part + 2 * N, mask=m_n, other=0.0)
        if HAS_ENTROPY:
            moved = tl.where(b_part_max == float("-inf"), 0.0, b_part_max - b_max)
            b_u += b_shrink * (tl.load(p_part + 3 * N, mask=m_n, other=0.0) + moved * b_part_sum)
    b_logp = (b_logit - b_max) - tl.log(b_sum)
    b_logp = tl.where((b_target >= 0) & (b_target < V), b_logp, float("nan"))
    tl.store(logp_ptr + o_n, b_logp, mask=m_n)
    tl.store(row_max_ptr + o_n, b_max, mask=m_n)
    tl.store(argmax_ptr + o_n, b_argmax.to(tl.int64), mask=m_n)
    tl.store(row_sum_ptr + o_n, b_sum, mask=m_n)
    tl.store(logit_ptr + o_n, b_logit, mask=m_n)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + o_n, tl.log(b_sum) - b_u / b_sum, mask=m_n)
