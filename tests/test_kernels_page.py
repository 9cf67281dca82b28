"""The page of kernels says what the result file says, and counts work as the kernels do."""

import pytest

from experiments.bench import kernels_page as bench


@pytest.mark.parametrize("device", bench.PAGES)
def test_the_page_is_that_of_the_kept_results(device):
    """Where it is not: python -m experiments.bench.kernels_page."""
    assert bench.PAGES[device].read_text() == bench.page(device)


@pytest.mark.parametrize("op", ["attention fwd", "attention fwd+bwd"])
def test_flops_a_byte_of_attention_are_those_of_its_arrays(op):
    B, T, N, K, H = 8, 4096, 96, 8, 128
    q, k = 2 * B * T * N * H, 2 * B * T * K * H  # bytes; o is as large as q, v as k
    flops = 4 * B * N * H * T * T / 2
    moved = 2 * q + 2 * k
    if op == "attention fwd+bwd":  # five more products; q, k, v, o again, do, dq, dk, dv
        flops, moved = 3.5 * flops, 3 * moved
    row = {"op": op, "shape": f"B{B} T{T} {N}/{K} d{H}"}
    assert bench.flop_per_byte("attention", row) == pytest.approx(flops / moved)


@pytest.mark.parametrize(("dtype", "size"), [("bf16", 2), ("fp8", 1)])
def test_flops_a_byte_of_decoding_are_those_of_the_keys_and_values(dtype, size):
    N, K, H, S = 96, 8, 128, 8192
    row = {"impl": "ours", "shape": f"B64 S{S} T1 {N}/{K} d{H} {dtype} pages of 16"}
    expected = 4 * N * H * S / (2 * K * H * S * size)
    assert bench.flop_per_byte("kernels_decode", row) == pytest.approx(expected)
    contiguous = row | {"impl": "jax cudnn, contiguous bf16"}
    assert bench.flop_per_byte("kernels_decode", contiguous) == pytest.approx(N / K)


def test_a_peer_that_failed_is_a_row_that_says_so_and_no_point():
    row = {"op": "fwd", "shape": "s", "impl": "other", "error": "RuntimeError: no"}
    assert bench.cells(row)[-1] == "failed: RuntimeError: no"
    assert not bench.points("kernels_grouped_matmul", [row])


def test_a_device_without_rows_is_told_so():
    with pytest.raises(SystemExit, match="no rows of kernels for none-x1"):
        bench.page("none-x1")
