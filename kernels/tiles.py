"""Pieces shared by the lm-head kernels: one logits tile, the arithmetic after the matmul, the online softmax.

In the kernels i_ is a program index, o_ offsets, m_ a mask, p_ a pointer, b_ a block in registers.
"""

import triton
import triton.language as tl


@triton.jit
def logits_tile(
    hidden_ptr,  # of the tile's first row
    weight_ptr,  # of the tile's first vocabulary entry
    rows,  # rows that exist from there on
    columns,
    D,
    stride_hn,
    stride_wv,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """hidden @ weight.T of one tile in ACC precision; rows and columns past the edges come out as 0.

    The pointers carry the int64 part of the address (V * D passes 2^31), so offsets inside a tile fit int32: as int64
    they would take half of the registers.
    """
    o_n = tl.arange(0, BLOCK_N)
    o_v = tl.arange(0, BLOCK_V)
    o_d = tl.arange(0, BLOCK_D)
    o_hidden = o_n[:, None] * stride_hn + o_d[None, :]
    o_weight = o_v[None, :] * stride_wv + o_d[:, None]
    b_acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=ACC)
    for start in range(0, D, BLOCK_D):
        m_d = o_d < D - start
        b_hidden = tl.load(hidden_ptr + start + o_hidden, mask=(o_n < rows)[:, None] & m_d[None, :], other=0.0)
        b_weight = tl.load(weight_ptr + start + o_weight, mask=(o_v < columns)[None, :] & m_d[:, None], other=0.0)
        if UPCAST:  # the interpreter multiplies the bit patterns of bf16
            b_hidden = b_hidden.to(ACC)
            b_weight = b_weight.to(ACC)
        b_acc = tl.dot(b_hidden, b_weight, b_acc, input_precision="ieee", out_dtype=ACC)
    return b_acc


@triton.jit
def tanh_and_grad(x):
    """tanh x and 1 - tanh^2 x from e = exp(-2|x|), neither by a difference that cancels.

    Below 0.25 the quotient (1 - e) / (1 + e) would, so an odd polynomial takes over (1e-8 relative); in float64 below
    0.04 (1e-16), where the quotient has 1e-14. The derivative is 4e / (1 + e)^2 everywhere.
    """
    near = 0.0016 if x.dtype == tl.float64 else 0.0625
    e = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - e) / (1.0 + e)
    x2 = x * x
    series = 1.0 + x2 * (
        -0.3333333333333333 + x2 * (0.13333333333333333 + x2 * (-0.05396825396825397 + x2 * 0.021869488536155203))
    )
    value = tl.where(x2 < near, x * series, tl.where(x < 0, -quotient, quotient))
    return value, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def finish_logits(
    b_z,  # [BLOCK_N, BLOCK_V] hidden @ weight.T
    bias_ptr,
    o_v,  # vocabulary ids, in a shape that broadcasts to b_z
    V,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """+ bias, x scale, softcap, / temperature, in that order; then -inf past the vocabulary.

    Also returns d(softcap(x))/dx, which is 1 without a softcap.
    """
    if HAS_BIAS:
        b_z += tl.load(bias_ptr + o_v, mask=(o_v >= 0) & (o_v < V), other=0.0).to(b_z.dtype)
    b_z = b_z * LOGIT_SCALE
    b_softcap_grad = tl.full(b_z.shape, 1.0, b_z.dtype)
    if HAS_SOFTCAP:
        b_t, b_softcap_grad = tanh_and_grad(b_z * (1.0 / SOFTCAP))
        b_z = b_t * SOFTCAP
    b_z = b_z * (1.0 / TEMPERATURE)
    # The mask comes last: a bias or softcap on a masked logit would make it finite again.
    b_z = tl.where(o_v < V, b_z, float("-inf"))
    return b_z, b_softcap_grad


@triton.jit
def guarded_exp(b_x, b_max):
    """exp(x - max), 0 where both are -inf."""
    return tl.where(b_x == float("-inf"), 0.0, tl.exp(b_x - b_max))


@triton.jit
def one_minus_exp(x):
    """1 - e^x for x <= 0: a polynomial above -0.25, where the difference cancels (5e-8 relative); in float64 above -0.01
    (1e-15), where the difference has 1e-14."""
    near = -0.01 if x.dtype == tl.float64 else -0.25
    series = -x * (
        1.0
        + x
        * (
            0.5
            + x
            * (0.16666666666666666 + x * (0.041666666666666664 + x * (0.008333333333333333 + x * 0.001388888888888889)))
        )
    )
    return tl.where(x > near, series, 1.0 - tl.exp(x))
