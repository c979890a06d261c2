"One thread a worker, no window, no network: set before any test imports torch."
import os

import PIL
import pytest

collect_ignore = ["bench"]  # a program and its drivers; test_bench.py tests them

for name, value in {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                    "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}.items():
    os.environ.setdefault(name, value)


def pytest_collection_modifyitems(config, items):
    "Skip what takes minutes, visibly, unless `-m` chooses; and what an old Pillow draws otherwise."
    if tuple(map(int, PIL.__version__.split(".")[:2])) < (10, 3):
        for item in items:
            if "drawn" in item.keywords: item.add_marker(pytest.mark.skip(reason="Pillow before 10.3 draws other edges, which encoders see"))
    if config.option.markexpr: return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="slow: run with pytest -m slow"))
