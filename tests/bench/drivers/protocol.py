"""Answer commands, one line of JSON each, and measure memory: what our processes and the peers' have in common.

Standard library only, since the peers' processes import this file in *their* Python.
"""
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


def process_memory(
    peak: bool = False,  # the most it ever was, or since the last reset, instead of what it is now
) -> int:  # bytes
    "Read how much main memory this process holds."
    try: lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux: only the peak is known
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    key = "VmHWM:" if peak else "VmRSS:"
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

class MemoryMeter:
    "Measure by how much the memory of this process grows at most; on a GPU, what its tensors take at most."
    def __init__(self): self.before = process_memory()

    def reset(self) -> None:
        "Forget the peak, where the system can."
        torch = sys.modules.get("torch")
        if torch and torch.cuda.is_initialized(): torch.cuda.reset_peak_memory_stats()
        try: Path("/proc/self/clear_refs").write_text("5")
        except OSError: pass

    def growth(self) -> int:
        "Return bytes since the meter was made, at the peak."
        torch = sys.modules.get("torch")
        if torch and torch.cuda.is_initialized(): return torch.cuda.max_memory_allocated()
        return max(process_memory(peak=True) - self.before, 0)

def first_step():
    "Have PyTorch import what it imports at the first step of an optimiser: that is no memory of the system's."
    import torch
    weight = torch.zeros(1, requires_grad=True)
    weight.sum().backward()
    torch.optim.Adam([weight]).step()

def serve_commands(
    load: Callable,  # imports what is needed; memory is counted from here on
    prepare: Callable,  # returns facts about the case, and a dictionary of commands
) -> None:
    "Answer commands, one line of JSON each, until the input ends."
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed is no answer
    def answer(**values): print(json.dumps(values), file=answers, flush=True)
    load()
    first_step()
    meter = MemoryMeter()
    facts, commands = prepare()
    answer(memory=meter.growth(), **facts)
    for line in sys.stdin:
        job = json.loads(line)
        meter.reset()
        start = time.perf_counter()
        found = commands[job.pop("do")](**job) or {}
        answer(**{"seconds": time.perf_counter() - start, "memory": meter.growth(), **found})
