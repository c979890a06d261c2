"`python tests/bench` (or `python -m tests.bench`): measure; see `--help`."
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # this folder as the package `bench`, and the clone's own mmseqrec

from bench.run import bench_main

if __name__ == "__main__": sys.exit(bench_main())
