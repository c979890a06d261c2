"""The benchmark: speed and memory of everything in this package, in turns with the released code where it is at hand.

From a clone in which mmseqrec is installed (`pip install -e .`):

    python tests/bench --quick                        # a few minutes, to see that it works
    python tests/bench                                # our side, and a reference mode
    python tests/bench --bench FOLDER --recbole-python PYTHON --unisrec-code FOLDER --missrec-code FOLDER
    python tests/bench --table --output bench.json    # show what a file holds

The same command continues a benchmark that was stopped. What ships with the package was measured with
`--rounds 3 --round-seconds 4 --threads 2`, all three peers, and is shown by page 82 (`nbs/82_bench.ipynb`).

`run` has the command and the list of cases, `measure` the rounds, `trainee` our systems, `reference` the reference
mode, `jobs` the curves, `workers` the processes, `drivers` the programs that run in them (the peers' in the peers' own
Python), `machine` the clock and the matrix rate, `data` what is trained on, `tables` the reading of a result. pytest
collects nothing here; `tests/test_bench.py` tests it.
"""
