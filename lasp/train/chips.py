"""Chips: how many floating-point operations a second one can do at best."""

import re
import time

import torch

# Dense, in TFLOP/s: bfloat16, TF32 and float32 and float64 without it, of the makers' data sheets (with sparsity they
# print twice as much). H100 SXM, NVL, PCIe, H200: "NVIDIA H100 Tensor Core GPU", "NVIDIA H200 Tensor Core GPU". B200,
# GB200: "NVIDIA Blackwell Datasheet". A100: "NVIDIA A100 Tensor Core GPU". L40S, L4, A40, RTX: the sheets of these
# names. MI300X, MI325X: "AMD Instinct MI300X", "AMD Instinct MI325X".
_PEAKS = {
    "GB200": (2500.0, 1250.0, 80.0, 40.0),
    "B200": (2250.0, 1125.0, 75.0, 37.0),
    "H200": (989.5, 494.7, 66.9, 66.9),
    "H100 PCIe": (756.0, 378.0, 51.2, 51.2),
    "H100 NVL": (835.0, 417.5, 60.0, 60.0),
    "H100": (989.5, 494.7, 66.9, 66.9),
    "H800": (989.5, 494.7, 66.9, 1.0),
    "A100": (312.0, 156.0, 19.5, 19.5),
    "A800": (312.0, 156.0, 19.5, 9.7),
    "A40": (149.7, 74.8, 37.4, 0.6),
    "RTX A6000": (154.8, 77.4, 38.7, 0.6),
    "L40S": (362.0, 183.0, 91.6, 1.4),
    "L4": (121.0, 60.0, 30.3, 0.5),
    "RTX 5090": (209.5, 104.8, 104.8, 1.6),
    "RTX 4090": (165.2, 82.6, 82.6, 1.3),
    "RTX 3090": (71.0, 35.6, 35.6, 0.6),
    "MI300X": (1307.4, 653.7, 163.4, 163.4),
    "MI325X": (1307.4, 653.7, 163.4, 163.4),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second of matrix products in a dtype: of a GPU as its maker says, None where it is not in the table;
    of a CPU as one rank measures it now, beside whatever else runs there."""
    if device.type == "cpu":
        return _measured(dtype)
    return known_peak(torch.cuda.get_device_name(device), dtype, torch.get_float32_matmul_precision() != "highest")


def known_peak(name: str, dtype: torch.dtype, tf32: bool) -> float | None:
    """That of the chip of this name. tf32: whether float32 is multiplied in TF32."""
    found = [chip for chip in _PEAKS if re.search(rf"\b{chip}\b", name)]
    if not found:
        return None
    column = {torch.bfloat16: 0, torch.float16: 0, torch.float32: 1 if tf32 else 2, torch.float64: 3}[dtype]
    return _PEAKS[max(found, key=len)][column] * 1e12


def _measured(dtype: torch.dtype, size: int = 512) -> float:
    x = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
