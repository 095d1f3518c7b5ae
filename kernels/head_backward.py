"""The gradient with respect to one vocabulary chunk of logits, from the recomputed matmul tile.

    dz[n, k] = c[n] (1[k = y_n] - p[n, k]) - g[n] p[n, k] (log p[n, k] + H[n]),     p = e^(z - m) / s

c is the upstream gradient of logp, g that of the entropy H. What is stored is the gradient at the matmul's output,
dz * logit_scale / temperature * (1 - tanh^2) with a softcap, in the dtype the next matmul wants.

    tile  [N, C]  fp32, hidden @ weight[first : first + C].T        out  [N, C]  bf16, fp16 or fp32
"""

import triton
import triton.language as tl

from .tiles import finish_logits, guarded_exp, one_minus_exp


@triton.jit
def dlogits(
    b_z,  # [BLOCK_N, BLOCK_V] finished logits
    o_v,
    b_max,  # [BLOCK_N, 1], like all that follow
    b_sum,
    b_c,
    b_target,
    b_argmax,
    b_logp_y,
):
    """z, p and c (1[k = y] - p); the forward's own numbers at the target and at the row's maximum."""
    # This matmul may round differently from the forward's. A nearly certain token would be off by the rounding of its
    # logit, but the forward kept that logit: it is the row's maximum.
    b_z = tl.where(o_v[None, :] == b_argmax, b_max, b_z)
    # At the target use the forward's logp: as p_y -> 1 the difference 1 - p_y would be all rounding.
    m_y = o_v[None, :] == b_target
    b_p = tl.where(m_y, tl.exp(b_logp_y), guarded_exp(b_z, b_max) / b_sum)
    return b_z, b_p, tl.where(m_y, one_minus_exp(b_logp_y), -b_p) * b_c


@triton.jit
def dlogits_kernel(
    tile_ptr,
    bias_ptr,
    target_ptr,
    logp_ptr,
    row_max_ptr,
    row_sum_ptr,
    argmax_ptr,
    entropy_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,
    out_ptr,
    N,
    V,
    FIRST,  # vocabulary id of the tile's first column
    C,
    stride_tn,
    stride_on,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    o_v = FIRST + o_c
    m_n = o_n < N
    m_tile = m_n[:, None] & (o_c < C)[None, :]
    b_z = tl.load(tile_ptr + o_n[:, None] * stride_tn + o_c[None, :], mask=m_tile, other=0.0)
    b_z, b_softcap_grad = finish_logits(
        b_z, bias_ptr, o_v[None, :], V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, HAS_BIAS, HAS_SOFTCAP
    )
    b_max = tl.load(row_max_ptr + o_n, mask=m_n, other=0.0)[:, None]
    b_sum = tl.load(row_sum_ptr + o_n, mask=m_n, other=1.0)[:, None]
    b_c = tl.load(grad_logp_ptr + o_n, mask=m_n, other=0.0)[:, None]
    b_target = tl.load(target_ptr + o_n, mask=m_n, other=-1)[:, None]
    b_argmax = tl.load(argmax_ptr + o_n, mask=m_n, other=-1)[:, None]
    b_logp_y = tl.load(logp_ptr + o_n, mask=m_n, other=0.0)[:, None]
    b_z, b_p, b_dz = dlogits(b_z, o_v, b_max, b_sum, b_c, b_target, b_argmax, b_logp_y)
    if HAS_GRAD_ENTROPY:
        b_g = tl.load(grad_entropy_ptr + o_n, mask=m_n, other=0.0)[:, None]
        b_entropy = tl.load(entropy_ptr + o_n, mask=m_n, other=0.0)[:, None]
        b_logp = tl.where(o_v[None, :] == b_target, b_logp_y, b_z - b_max - tl.log(b_sum))
        b_dz -= tl.where(b_p == 0.0, 0.0, b_g * b_p * (b_logp + b_entropy))
    b_dz = b_dz * b_softcap_grad * (LOGIT_SCALE / TEMPERATURE)
    tl.store(out_ptr + o_n[:, None] * stride_on + o_c[None, :], b_dz.to(out_ptr.dtype.element_ty), mask=m_tile)
