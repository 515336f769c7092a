#!/usr/bin/env bash
# Everything that wants a GPU, unattended, each part in under 10 minutes.
#
#   benchmarks/gpu_suite.sh [OUT]     results go to OUT, else to benchmarks/results/<gpu>/ (without a GPU to runs/suite/)
#
# A part that is done is not repeated, one that failed is noted and the next one starts; the exit status is 0 if none
# failed. Takes the checkout as it is and installs nothing: torch, triton and numpy are enough for the benchmarks of
# kernels, step and attack, and a part that needs more says so.
#
#   PYTHON=...           the interpreter (python3)
#   SUITE_PARTS="a b"    these parts alone
#   SUITE_LIST=1         print the parts and their commands, run nothing
#   SUITE_QUICK=1        tiny sizes, a few minutes on a CPU: to try the suite out
#   FASHION_MNIST=DIR    the folder with the four files of Fashion-MNIST, for a training run on it
set -uo pipefail
[ $# -gt 0 ] && mkdir -p "$1" && OUT=$(realpath "$1")
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PY=${PYTHON:-python3}
LIMIT_S=590
failed=()

if [ -z "${OUT:-}" ]; then
    gpu=$("$PY" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "")')
    OUT=$PWD/${gpu:+benchmarks/results/}${gpu:-runs/suite}
fi
mkdir -p "$OUT"
work=$(mktemp -d) # of training runs; only what they measured is kept
trap 'rm -rf "$work"' EXIT

part() { # NAME NEEDS COMMAND...: once, in under LIMIT_S, what it prints into OUT/NAME.txt; NEEDS: modules, or "-"
    local name=$1 needs=$2 missing started code; shift 2
    [ -n "${SUITE_PARTS:-}" ] && [[ " $SUITE_PARTS " != *" $name "* ]] && return
    if [ -n "${SUITE_LIST:-}" ]; then printf '%s:' "$name"; printf ' %q' "$@"; echo; return; fi
    grep -qs "^$name " "$OUT/done.txt" && return
    missing=$(missing "$needs")
    if [ -n "$missing" ]; then
        echo "== $name: skipped: needs $missing" | tee "$OUT/$name.txt"
        return
    fi
    echo "== $name"
    started=$SECONDS
    timeout -k 10 $LIMIT_S "$@" >"$OUT/$name.txt" 2>&1
    code=$?
    if [ $code = 0 ] && wrong_rows "$OUT/$name.json"; then
        echo "$name $((SECONDS - started)) s, $(date -u +%FT%TZ), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)" >>"$OUT/done.txt"
    else
        echo "   failed with $code after $((SECONDS - started)) s, see $OUT/$name.txt"
        failed+=("$name")
    fi
}

missing() { # MODULE,MODULE,... or PROGRAM!: those that are not here
    "$PY" - "$1" <<'END'
import importlib.util, shutil, sys
here = lambda name: shutil.which(name[:-1]) if name.endswith("!") else importlib.util.find_spec(name)
print(", ".join(name.rstrip("!") for name in sys.argv[1].split(",") if name != "-" and not here(name)))
END
}

wrong_rows() { # FILE: fails if a row of ours in it disagrees, or failed
    [ -e "$1" ] || return 0
    "$PY" - "$1" <<'END'
import json, sys
bad = [row for row in json.load(open(sys.argv[1])).get("rows", []) if row["exactness"] != "peer" and row["reason"]]
bad = [row for row in bad if not row["table"].startswith("sweep") or row["name"].startswith("as it is")]
bad = [f"   {row['table']}: {row['name']}: {row['reason']}" for row in bad if row["reason"].startswith(("disagrees", "fails"))]
print(*bad, sep="\n", end="\n" if bad else "")
sys.exit(bool(bad))
END
}

bench() { # NAME WHAT WORDS...
    local name=$1 what=$2; shift 2
    part "$name" - "$PY" -m retemper bench "$what" --json "$OUT/$name.json" "$@" ${SUITE_QUICK:+--quick --rounds 2}
}

part nvidia_smi nvidia-smi! nvidia-smi
tests="tests/kernels"
for module in attack capture fold step; do tests+=" tests/engine/test_$module.py"; done
[ -n "${SUITE_QUICK:-}" ] && tests=tests/kernels/test_pgd_step.py
part tests pytest,hypothesis "$PY" -m pytest -q --import-mode=importlib -p no:cacheprovider $tests \
    --deselect tests/kernels/test_compiles.py
part ranks pytest,safetensors "$PY" -m pytest -q --import-mode=importlib -p no:cacheprovider tests/engine/test_ranks.py -m gpu
gpus=$(nvidia-smi -L 2>/dev/null | wc -l)
if [ "$gpus" -gt 1 ]; then
    part ranks_$gpus sklearn,safetensors "$PY" -m torch.distributed.run --nproc-per-node "$gpus" \
        -m retemper train absld:digits --epochs 4 --batch-size $((8 * gpus)) --out "$work/ranks"
fi
part sanitizer compute-sanitizer! compute-sanitizer --tool memcheck --error-exitcode 1 \
    "$PY" -m retemper bench kernels --quick --rounds 1

bench kernels_images kernels --only "pgd_step_ " "random_start_ " "augment "
bench kernels_epilogue kernels --only "epilogue "
bench kernels_logits kernels --only class_
bench kernels_calls kernels --only "host time" "first call"
bench sweep_images kernels --sweep --only pgd_step_ random_start_ augment epilogue
bench sweep_kl kernels --sweep --only "kl forward"
bench sweep_kl_grad kernels --sweep --only kl_grad
bench sweep_sums kernels --sweep --only class_sums

if [ -n "${SUITE_QUICK:-}" ]; then # on a CPU a step of the others takes seconds
    bench step_tiny_resnet step --only tiny_resnet
else
    for batch in 128 1024; do
        bench step_resnet18_$batch step --only resnet18 --batch $batch
        bench step_mobilenet_v2_$batch step --only mobilenet_v2 --batch $batch
    done
fi
part profile - "$PY" -m retemper bench step --profile "$OUT" ${SUITE_QUICK:+--quick}

bench attack_tiny_resnet attack --only tiny_resnet
if [ -z "${SUITE_QUICK:-}" ]; then
    bench attack_resnet18 attack --only resnet18
    bench attack_mobilenet_v2 attack --only mobilenet_v2
fi
bench loaders loaders

if [ -n "${SUITE_QUICK:-}" ]; then
    part digits sklearn,safetensors "$PY" -m retemper train sat:digits --epochs 1 --attack-steps 1 --out "$work/digits"
else
    part digits sklearn,safetensors "$PY" benchmarks/digits.py --seeds 1 --out "$work/digits" --json "$OUT/digits.json"
fi
for folder in "${FASHION_MNIST:-}" /usr/share/datasets/fashion-mnist /usr/share/datasets; do
    if [ -z "${SUITE_QUICK:-}" ] && [ -e "$folder/train-images-idx3-ubyte.gz" ]; then
        part fashion_mnist safetensors bash -c "'$PY' -m retemper train absld:fashion_mnist_small \
            --data-root '$folder' --out '$work/fashion' && '$PY' -m retemper evaluate '$work/fashion' \
            --data-root '$folder' && cp '$work/fashion/evaluation.json' '$OUT/fashion_mnist.json'"
        break
    fi
done

if [ -n "${SUITE_LIST:-}" ]; then exit 0; fi
echo "results in $OUT; python benchmarks/tables.py puts those of benchmarks/results into the documents"
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
