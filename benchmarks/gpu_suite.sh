#!/usr/bin/env bash
# Everything that wants a GPU, unattended, in under 10 minutes a part; a part that is done is not repeated.
#   benchmarks/gpu_suite.sh [OUT]      results go to OUT, else to benchmarks/results/<gpu>/
# Needs torch, triton, numpy and what pyproject.toml names besides; takes the checkout as it is, nothing is installed.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PY=${PYTHON:-python3}
gpu=$($PY -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "cpu")')
OUT=${1:-benchmarks/results/$gpu}
mkdir -p "$OUT"

part() { # NAME COMMAND...: run it once, keep what it prints
    local name=$1; shift
    [ -e "$OUT/$name.done" ] && return
    echo "== $name"
    if timeout 590 "$@" > "$OUT/$name.txt" 2>&1; then touch "$OUT/$name.done"; else echo "   failed, see $OUT/$name.txt"; fi
}

part tests $PY -m pytest -q tests/kernels tests/engine/test_attack.py tests/engine/test_step.py \
    --deselect tests/kernels/test_compiles.py
for what in kernels step loaders; do
    part "bench_$what" $PY -m retemper.engine bench "$what" --json "$OUT/bench_$what.json"
done
if command -v compute-sanitizer >/dev/null; then
    part sanitizer compute-sanitizer --error-exitcode 1 $PY -m retemper.engine bench kernels --rounds 1
fi
part digits $PY benchmarks/digits.py --seeds 1 --out "$OUT/digits" --json "$OUT/digits.json"
[ -e "$OUT/digits.done" ] && rm -rf "$OUT/digits"
echo "results in $OUT"
