#!/bin/sh
# What takes an NVIDIA GPU, in ten minutes at most: tests, pages of the systems, benchmark, bf16 beside 32 bits.
#   sh tests/gpu.sh [FILE]                            # writes FILE (default: gpu.json) after each step
#   sh tests/gpu.sh try.json --device cpu --tiny      # only to see that it works, without a GPU
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
