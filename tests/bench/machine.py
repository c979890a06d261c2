"Clocks and the floor: how fast this machine multiplies matrices, and how many products a call takes."
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmseqrec.artifacts import provenance

from .options import BenchOptions


def measure_seconds(
    run: Callable,  # called once, without arguments
) -> tuple[float, object]:  # seconds, and what `run` returned
    "Time a call, and the work it leaves to a GPU."
    def meet():
        if torch.cuda.is_initialized(): torch.cuda.synchronize()
    meet()
    start = time.perf_counter()
    result = run()
    meet()
    return time.perf_counter() - start, result

# m, k, n: a square, 256 targets against all items, all positions of a batch through a feed-forward layer
SHAPES = {"square": (1536, 1536, 1536), "scores": (256, 300, 3000), "feed-forward": (1500, 300, 256)}

def matrix_rate(
    shape: tuple[int, int, int] = (1536, 1536, 1536),  # m, k, n
    precision: str = "no",  # 32 bits; or `"bf16"`
    device: str = "cpu",  # or `"cuda"`
    seconds: float = 0.3,  # how long to try
) -> float:  # operations a second, median of several products
    "Measure how fast matrices are multiplied."
    m, k, n = shape
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(m, k, dtype=dtype, device=device), torch.randn(k, n, dtype=dtype, device=device)
    a @ b
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end: times.append(measure_seconds(lambda: a @ b)[0])
    return 2 * m * k * n / statistics.median(times)

def count_operations(
    run: Callable,  # called once, without arguments
) -> int:  # 2 m k n for each product of matrices, forward and backward
    "Count the floating-point operations of matrix products in a call."
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter: run()
    return counter.get_total_flops()

def describe_machine(
    options: BenchOptions,
) -> dict:  # `provenance`, with processor, threads, memory and GPU
    "Say where and with what a benchmark ran."
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration): cpu = platform.processor() or platform.machine()
    try: ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError): ram = None
    gpu = torch.cuda.get_device_name() if options.device != "cpu" and torch.cuda.is_available() else None
    return provenance(cpu=cpu, threads=options.threads, ram=ram, gpu=gpu)
