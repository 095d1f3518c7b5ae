"""37 kernels broken by hand, each as someone might break it: the tests must catch every one.

A mutant is a copy of the package with one line changed; `test_logps.py`, for the sparse backward `test_sparse.py`, runs on it and must fail.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD, FOLD, BACK, TILES = (
    "kernels/head_logps.py",
    "kernels/fold_logits.py",
    "kernels/head_backward.py",
    "kernels/tiles.py",
)
SCATTERED = "bco_fast/head/sparse/triton.py"
SPARSE, CHOICE = "kernels/sparse_backward.py", "bco_fast/head/sparse/choose.py"
WALK, LAUNCH = "bco_fast/head/backends/walk.py", "bco_fast/head/backends/triton.py"
TILING, GATHERED = "bco_fast/head/tiling.py", "bco_fast/head/sparse/torch.py"

MUTANTS = {
    "vocabulary mask dropped": (TILES, 'b_z = tl.where(o_v < V, b_z, float("-inf"))', "b_z = b_z"),
    "vocabulary mask off by one": (TILES, "tl.where(o_v < V, b_z", "tl.where(o_v <= V, b_z"),
    "last block of D skipped": (TILES, "for start in range(0, D, BLOCK_D):", "for start in range(0, D - BLOCK_D + 1, BLOCK_D):"),
    "mask of D dropped": (TILES, "m_d = o_d < D - start", "m_d = o_d < D"),
    "accumulator restarted": (TILES, "tl.dot(b_hidden, b_weight, b_acc,", "tl.dot(b_hidden, b_weight, b_acc * 0,"),
    "strides swapped": (TILES, "o_hidden = o_n[:, None] * stride_hn", "o_hidden = o_n[:, None] * stride_wv"),
    "bias after the scale": (TILES, "other=0.0).to(b_z.dtype)\n", "other=0.0).to(b_z.dtype) / LOGIT_SCALE\n"),
    "temperature forgotten": (TILES, "b_z = b_z * (1.0 / TEMPERATURE)", "b_z = b_z * 1.0"),
    "derivative of the softcap is 1": (TILES, "return value, 4.0 * e / ((1.0 + e) * (1.0 + e))", "return value, 0.0 * e + 1.0"),
    "half-precision accumulator": (TILES, "    return b_acc\n", "    return b_acc.to(tl.float16).to(ACC)\n"),
    "running sum not rescaled": (HEAD, "b_sum = b_sum * b_shrink + tl.sum(b_e, axis=1)", "b_sum = b_sum + tl.sum(b_e, axis=1)"),
    "maximum forgotten": (HEAD, "b_new = tl.maximum(b_max, b_highest)", "b_new = b_highest"),
    "last block of a range skipped": (HEAD, "tl.minimum(SPLIT, V - first_column), BLOCK_V):", "tl.minimum(SPLIT, V - first_column) - BLOCK_V, BLOCK_V):"),
    "entropy sum not moved": (HEAD, "b_u = b_shrink * (b_u + moved * b_sum)", "b_u = b_shrink * b_u"),
    "splits not rescaled": (HEAD, "b_sum += b_part_sum * b_shrink", "b_sum += b_part_sum"),
    "foreign target not NaN": (HEAD, 'b_logp = tl.where((b_target >= 0) & (b_target < V), b_logp, float("nan"))', "b_logp = b_logp"),
    "fold keeps the old maximum": (FOLD, "b_shrink = guarded_exp(b_max, b_new)", "b_shrink = guarded_exp(b_max, b_max)"),
    "fold leaves the target in": (FOLD, "b_e = tl.where(m_y, 0.0, b_e)", "b_e = b_e"),
    "gradient of the target dropped": (BACK, "return b_z, b_p, tl.where(m_y, one_minus_exp(b_logp_y), -b_p) * b_c", "return b_z, b_p, -b_p * b_c"),
    "sign of the target's gradient": (BACK, "tl.where(m_y, one_minus_exp(b_logp_y), -b_p)", "tl.where(m_y, -one_minus_exp(b_logp_y), -b_p)"),
    "maximum from this tile": (BACK, "b_z = tl.where(o_v[None, :] == b_argmax, b_max, b_z)", "b_z = b_z"),
    "column of the maximum off by a tile": (HEAD, "start.to(tl.int32) + b_column", "first_column.to(tl.int32) + b_column"),
    "a tile too large": (TILING, "    def used() -> float:\n", "    return n, v\n\n    def used() -> float:\n"),
    "scale missing in the gradient": (BACK, "b_dz = b_dz * b_softcap_grad * (LOGIT_SCALE / TEMPERATURE)", "b_dz = b_dz * b_softcap_grad"),
    "entropy gradient without H": (BACK, "b_g * b_p * (b_logp + b_entropy)", "b_g * b_p * b_logp"),
    "chunk offset forgotten": (LAUNCH, "FIRST=columns.start, C=c, stride_tn=tile.stride(0), stride_on=out.stride(0),", "FIRST=0, C=c, stride_tn=tile.stride(0), stride_on=out.stride(0),"),
    "hidden gradient overwritten": (WALK, "add_matmul(d_hidden[rows], dz, chunk)", "matmul(dz, chunk, out=d_hidden[rows])"),
    "target of a gathered row forgotten": (GATHERED, "dz[exact.block[known] - first, exact.column[known]] = exact.value[known]", "pass"),
    "blocks of a foreign target dropped": (CHOICE, "torch.where(has_target[rows, None], 0.0, cost.gather(1, at))", "torch.zeros_like(at, dtype=cost.dtype)"),
    "twice the budget": (CHOICE, "dropped = (sums <= _UNITS).sum()", "dropped = (sums <= 2 * _UNITS).sum()"),
    "the last bin dropped whole": (CHOICE, "sums = spent + histogram.view(_BINS, replicas).sum(1).cumsum(0)", "parts = histogram.view(_BINS, replicas).sum(1); sums = spent + parts.cumsum(0) - parts"),
    "target blocks not kept": (CHOICE, "kept.gather(1, target_tile[rows]) | (has_target & (upstream != 0))[rows, None]", "kept.gather(1, target_tile[rows])"),
    "a cut tile not carried": (SPARSE, "mask=(o_d < tl.where(carried, D, 0))[None, :]", "mask=(o_d < 0)[None, :]"),
    "tiles written over one another": (SPARSE, "return (o_i - FIRST) * TILE", "return (o_i % 7) * TILE"),
    "scattered tiles written over one another": (SPARSE, "return o_n * stride_zn + (i_t - FIRST_TILE) * TILE", "return o_n * stride_zn"),
    "blocks of an earlier group stay": (SCATTERED, "self.dz.zero_()", "pass"),
    "a row's last product left out": (SPARSE, "for i in range(start, stop):", "for i in range(start, stop - 1):"),
    "weight gradient in the wrong tile": (SPARSE, "p_weight = d_weight_ptr + (o_v.to(tl.int64) * stride_wv)", "p_weight = d_weight_ptr + (o_c.to(tl.int64) * stride_wv)"),
    "weight gradient of the last rows only": (WALK, "add_matmul(d_chunk, dz.T, hidden_rows)", "matmul(dz.T, hidden_rows, out=d_chunk)"),
}  # fmt: skip


def test_there_are_39_and_each_changes_one_place():
    assert len(MUTANTS) == 39
    for name, (file, old, new) in MUTANTS.items():
        assert (ROOT / file).read_text().count(old) == 1, name
        assert old != new


def _caught(tmp_path: Path, file: str, old: str, new: str) -> bool:
    for folder in ("bco_fast", "kernels", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    target = tmp_path / file
    target.write_text(target.read_text().replace(old, new))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "tests/head/test_sparse.py" if file in (SPARSE, SCATTERED, CHOICE, GATHERED) else "tests/head/test_logps.py",
        "-k",
        "not gradcheck and not 500",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{tmp_path / 'tests'}"}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode in (0, 1), run.stdout + run.stderr
    assert "error" not in run.stdout.splitlines()[-1], run.stdout  # a mutant that does not even import proves nothing
    return run.returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(tmp_path, name):
    assert _caught(tmp_path, *MUTANTS[name])


@pytest.mark.slow
def test_the_unbroken_kernels_pass(tmp_path):
    assert not _caught(tmp_path, HEAD, "no such line", "no such line")
