"""The device that a worker computes on, and the number format."""

import torch

from schemas.config import InferencePrecision


def worker_device() -> torch.device:
    """Return the GPU that this process was given, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Return what a record says of the device: ``cpu`` or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def compute_dtype(precision: InferencePrecision, device: torch.device) -> torch.dtype:
    """Return the number format: ``auto`` is bfloat16 on a GPU, float32 on a CPU; ``fp8`` is bfloat16 in most parts."""
    match precision:
        case "bf16" | "fp8":
            return torch.bfloat16
        case "fp32":
            return torch.float32
        case _:
            return torch.bfloat16 if device.type == "cuda" else torch.float32
