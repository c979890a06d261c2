"Shapes in letters, seeds from names, devices by name."
import random
import re

import numpy as np
import pytest
import torch

from mmseqrec.core import AXES, check_shape, derive_seed, get_device, get_precision, set_seed


@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
def test_check_shape_returns_its_argument(make):
    x = make((2, 3, 2))
    assert check_shape(x, "B L B") is x and check_shape(x, "B 3 D", D=2) is x
    assert check_shape(make(()), "").shape == ()

@pytest.mark.parametrize("axes, sizes, message", [
    ("B L", {}, "expected 2 axes [B, L], got 3: shape [2, 3, 4]"),
    ("B B D", {}, "axis 1 (B) of [B, B, D] must be 2, got 3"),
    ("B 5 D", {}, "axis 1 (5) of [B, 5, D] must be 5, got 3"),
    ("B L D", {"D": 8}, "axis 2 (D) of [B, L, D] must be 8, got 4"),
])
def test_check_shape_names_the_axis(axes, sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)): check_shape(np.zeros((2, 3, 4)), axes, **sizes)

def test_axes_are_single_capitals(): assert all(re.fullmatch("[A-Z]", letter) for letter in AXES)

def test_derived_seeds_never_change():
    "These digits are part of every stored result."
    assert derive_seed(0) == 5254295370254170289
    assert derive_seed(0, "order", 1) == derive_seed(0, "order", "1") == 2964989586871094720
    assert derive_seed(np.int64(7), "a") == derive_seed(7, "a")

def test_derived_seeds_differ():
    seeds = [derive_seed(s, *names) for s in range(50) for names in [(), ("a",), ("b",), ("a", "b"), ("ab",), ("a", 1)]]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)
    np.random.default_rng(max(seeds)), torch.Generator().manual_seed(max(seeds))

def test_set_seed_repeats_every_generator():
    def draw():
        set_seed(2**40 + 3)
        return random.random(), np.random.rand(), torch.rand(()).item()
    assert draw() == draw()

def test_devices():
    assert get_device("cpu") == torch.device("cpu") and get_device().type in ("cpu", "cuda", "mps")
    assert get_precision("cpu") == "no"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='auto'"): get_device("cuda:1")
