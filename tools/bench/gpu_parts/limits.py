"""What the device can do: the copy bandwidth and the matrix rate that every other row is held against."""

import torch

from gpu_parts.rows import Row, Setting, emit, seconds_of


def limits(setting: Setting, only: str = "") -> None:
    """Copy bandwidth (bytes read and written) and the rate of a square bf16 product; fp8 where the device has it."""
    device, megabytes, side, times = setting.device, 2048, 8192, 20
    if setting.small:
        megabytes, side, times = 4, 64, 2
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = seconds_of(lambda: target.copy_(source), device, times)
    emit(Row("limit: copy, read and written", 2 * source.numel() / seconds / 1e9, "GB/s"))

    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    left @ right
    seconds = seconds_of(lambda: left @ right, device, times)
    emit(Row("limit: bf16 product", 2 * side**3 / seconds / 1e12, "TFLOP/s"))

    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        one = torch.ones((), device=device)
        left8, right8 = left.to(torch.float8_e4m3fn), right.t().contiguous().to(torch.float8_e4m3fn).t()

        def product() -> torch.Tensor:
            return torch._scaled_mm(left8, right8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        product()
        emit(Row("limit: fp8 product", 2 * side**3 / seconds_of(product, device, times) / 1e12, "TFLOP/s"))
