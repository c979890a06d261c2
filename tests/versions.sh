#!/usr/bin/env bash
# Runs the suite in a fresh environment with every requirement at its lower bound, or at its newest version:
#   PYTHON=python3.10 TORCH=torch==2.13.0 bash tests/versions.sh lowest [arguments of pytest]
# torch is what TORCH says ("torch" by default), because old builds are rarely to be had for a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
which=${1:?lowest or newest}; shift
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=agg PIP_DISABLE_PIP_VERSION_CHECK=1
venv=${VENV:-$(mktemp -d)}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
. "$venv/bin/activate"
pip install -q "${TORCH:-torch}"
python - "$which" > "$venv/requirements.txt" <<'END'
import configparser, re, sys
settings = configparser.ConfigParser()
settings.read("settings.ini")
lines = (settings["DEFAULT"]["requirements"] + settings["DEFAULT"]["dev_requirements"]).split()
for line in lines:
    name, bound = re.match(r"([\w-]+)>=([\d.]+)", line).groups()
    if name != "torch": print(f"{name}=={bound}" if sys.argv[1] == "lowest" else line)
END
pip install -q --upgrade-strategy eager -U -r "$venv/requirements.txt"
pip install -q --no-deps -e .
python --version
pip list --format freeze | grep -iE "^($(sed -E 's/[>=].*//' "$venv/requirements.txt" | paste -sd'|')|torch)==" | paste -sd' '
python -m pytest "$@"
