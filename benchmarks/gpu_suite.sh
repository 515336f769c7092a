#!/usr/bin/env bash
# Everything that wants a GPU, unattended. The first two commands answer in a quarter of an hour what matters most:
#
#   benchmarks/gpu_suite.sh 1     how fast: the machine, every kernel beside its reference, the step and its phases
#   benchmarks/gpu_suite.sh 2     is it right: the tests; then real training on CIFAR-10 images, and PGD-20
#   benchmarks/gpu_suite.sh more  the rest: large batches, block sizes, attacks, loaders, sanitizer, several GPUs, profile
#
# A part has planned seconds, given below, and is stopped after twice as many; a command begins none that its own time
# does not hold. Results go to RESULTS, part by part, and into one archive in OUT. What is done is not repeated, tables
# and training that were cut short go on, what failed is noted and the next part starts; the exit status is 0 if none
# failed. Nothing is installed or fetched: torch, triton and numpy are enough for the first command, and a part that
# needs more says so.
#
#   RESULTS=DIR          where results lie between commands (runs/gpu_suite)
#   OUT=DIR              where the archive goes (RESULTS)
#   PYTHON=...           the interpreter (python3)
#   CIFAR10=DIR          CIFAR-10's own files, or a folder with them as train/CLASS/*.jpg, in a .tar.xz or not
#                        (shared/data or .carry; of JPEG copies a result says so)
#   SUITE_SECONDS=N      a command's time (420; of more: ten hours)
#   SUITE_PARTS="a b"    these parts alone
#   SUITE_LIST=1         print the parts, their planned seconds and commands, run nothing
#   SUITE_QUICK=1        tiny sizes, a few minutes on a CPU: to try the suite out
#   FASHION_MNIST=DIR    the folder with the four files of Fashion-MNIST, for a training run on it (more)
#
# .carry/triton.tar.gz, if it is there, holds Triton's cache of a rehearsal, so that little is compiled; .carry/commit
# the commit, where there is no .git.
set -uo pipefail
cd "$(dirname "$0")/.."
which=${1:-}
case $which in
1 | 2) time_s=420 ;;
more) time_s=36000 ;;
*) echo "usage: benchmarks/gpu_suite.sh 1|2|more" >&2; exit 2 ;;
esac
RESULTS=$(realpath -m "${RESULTS:-runs/gpu_suite}") OUT=$(realpath -m "${OUT:-${RESULTS:-runs/gpu_suite}}")
PY=${PYTHON:-python3} END=$((SECONDS + ${SUITE_SECONDS:-$time_s})) work=$RESULTS/work
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 XDG_CACHE_HOME=$work/cache
export RETEMPER_COMMIT=${RETEMPER_COMMIT:-$(cat .carry/commit 2>/dev/null)}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/retemper-triton} TORCHINDUCTOR_CACHE_DIR=/tmp/retemper-inductor
failed=() left=() rehearsed=${RETEMPER_REHEARSAL:-} patience=2
[ -n "$rehearsed" ] && patience=20 # nothing is fast there

part() { # NAME SECONDS NEEDS COMMAND...: once; what it prints into RESULTS/NAME.txt; NEEDS: modules, programs!, "gpu", "-"
    local name=$1 planned=$2 needs=$3 missing started code limit=$((END - SECONDS)); shift 3
    [ -n "${SUITE_PARTS:-}" ] && [[ " $SUITE_PARTS " != *" $name "* ]] && return
    if [ -n "${SUITE_LIST:-}" ]; then printf '%s %s s:' "$name" "$planned"; printf ' %q' "$@"; echo; return; fi
    grep -qs "^$name " "$RESULTS/done.txt" && return
    missing=$(missing "$needs")
    if [ -n "$missing" ]; then
        echo "== $name: skipped: needs $missing" | tee "$RESULTS/$name.txt"
        return
    fi
    if [ $limit -lt $((planned / 2)) ]; then left+=("$name"); return; fi
    [ $limit -gt $((patience * planned)) ] && limit=$((patience * planned))
    echo "== $name"
    started=$SECONDS
    timeout -s INT -k 10 $limit "${@/@seconds/$((limit * 3 / 4))}" >>"$RESULTS/$name.txt" 2>&1
    code=$?
    if [ $code = 0 ] && good_rows "$RESULTS/$name.json"; then
        echo "$name $((SECONDS - started)) s, $(date -u +%FT%TZ), commit $(commit)" >>"$RESULTS/done.txt"
        tail -n 25 "$RESULTS/$name.txt" | cut -c -200
    else
        echo "   failed with $code after $((SECONDS - started)) s, see $RESULTS/$name.txt"
        tail -n 5 "$RESULTS/$name.txt" | cut -c -200
        failed+=("$name")
    fi
    echo "   $name: $((SECONDS - started)) s of $planned planned"
    archive
}

missing() { # MODULE,PROGRAM!,...: those that are not here
    "$PY" - "$1" <<'END'
import importlib.util, shutil, sys
def here(name):
    if name == "gpu":
        import torch
        return torch.cuda.is_available()
    return shutil.which(name[:-1]) if name.endswith("!") else importlib.util.find_spec(name)
print(", ".join(name.rstrip("!") for name in sys.argv[1].split(",") if name != "-" and not here(name)))
END
}

good_rows() { # FILE: fails if a row of ours in it disagrees or failed, or if it is not complete
    [ -e "$1" ] || return 0
    "$PY" - "$1" <<'END'
import json, sys
found = json.load(open(sys.argv[1]))
bad = [row for row in found.get("rows", []) if row["exactness"] != "peer" and row["reason"]]
bad = [row for row in bad if not row["table"].startswith("sweep") or row["name"].startswith("as it is")]
bad = [f"   {row['table']}: {row['name']}: {row['reason']}" for row in bad if row["reason"].startswith(("disagrees", "fails"))]
bad += [] if found.get("complete", True) else ["   its time was up: the same command goes on"]
print(*bad, sep="\n", end="\n" if bad else "")
sys.exit(bool(bad))
END
}

commit() { git rev-parse --short HEAD 2>/dev/null || echo "${RETEMPER_COMMIT:-unknown}"; }

archive() { # all results so far, in one file that is whole at any time
    tar -C "$RESULTS" --exclude=./work --exclude='./*.tar.gz' -czf "$work/new.tar.gz" . &&
        mv "$work/new.tar.gz" "$OUT/gpu_suite.tar.gz"
    return 0
}

bench() { # NAME SECONDS WHAT WORDS...
    local name=$1 planned=$2 what=$3; shift 3
    part "$name" "$planned" - "$PY" -m retemper bench "$what" --json "$RESULTS/$name.json" --seconds @seconds "$@" \
        ${SUITE_QUICK:+--quick --rounds 2}
}

trained() { # NAME SECONDS RECIPE WORDS...: a run on CIFAR-10 images, its metrics kept
    local name=$1 planned=$2 recipe=$3; shift 3
    part "$name" "$planned" safetensors,filelock "$PY" -m retemper train "$recipe" --data-root "$images" \
        --out "$work/$name" --cache "$work/cache" "$@"
    cp "$work/$name/metrics.jsonl" "$RESULTS/$data.$name.metrics.jsonl" 2>/dev/null
}

evaluated() { # NAME SECONDS RUN WORDS...
    local name=$1 planned=$2 run=$3; shift 3
    part "$name" "$planned" safetensors,filelock "$PY" -m retemper evaluate "$work/$run" --data-root "$images" "$@"
    cp "$work/$run/evaluation.json" "$RESULTS/$data.$name.json" 2>/dev/null
}

# The plan of the first command, of modelled times that no GPU has confirmed: a part takes 10 s to start and to tune its
# convolutions; a ladder 24 rounds of 0.35 s (ResNet-18) or 0.7 s (MobileNetV2), mostly the released script's and those of
# 8 steps at once, and as much again for the checks before them; 87 kernels half a second each; torch.compile a minute.
how_fast() {
    local wanted=("released script" "released, any convolution" "careful PyTorch" "+ CUDA graph"
        "+ teacher for 8 batches at once" "+ table, every view known" "whole step" folding teacher attack
        "two forwards, backward" "the same with SGD and class sums")
    local peers=("released script" "careful PyTorch" "careful PyTorch, torch.compile" "+ CUDA graph"
        "+ table, every view known")
    part nvidia_smi 5 nvidia-smi! nvidia-smi -q -d CLOCK,POWER,TEMPERATURE,PERFORMANCE
    part rates 15 gpu "$PY" benchmarks/gpu_machine.py rates --json "$RESULTS/rates.json"
    bench kernels 60 kernels --batch 128 --rounds 5 --only " fp32 " " bf16 " " fp16 " --rows retemper "eager chain"
    if [ -n "${SUITE_QUICK:-}" ]; then # on a CPU a step of the others takes seconds
        bench step_tiny_resnet 60 step --only tiny_resnet
        return
    fi
    for student in resnet18 mobilenet_v2; do
        bench step_$student 55 step --batch 128 --only "ladder, $student" "phases, $student" --rows "${wanted[@]}"
    done
    bench step_resnet18_compiled 75 step --batch 128 --only "ladder, resnet18" --rows "${peers[@]}"
    part convolutions 25 gpu "$PY" benchmarks/gpu_machine.py convolutions --json "$RESULTS/convolutions.json"
    bench step_resnet18_options 90 step --batch 128 --only "all but one, resnet18"
}

# The plan of the second: an epoch is 383 steps of 20 ms, and there are 3, 3 and 2; PGD-20 in fp32 on 10,000 images is 450
# TFLOP; each process takes 10 s to start.
is_it_right() {
    local kernels="tests/kernels --deselect tests/kernels/test_compiles.py" engine="tests/benchmarks/test_bench.py"
    for module in abilities attack beside capture fold optim step; do engine+=" tests/engine/test_$module.py"; done
    [ -n "${SUITE_QUICK:-}" ] && kernels=tests/kernels/test_pgd_step.py engine=tests/engine/test_beside.py
    local several=""
    [ -z "$(missing xdist)" ] && [ -z "${SUITE_QUICK:-}" ] && several="-n 12 --dist loadscope"
    for tests in kernels engine; do
        # -v: what was cut short says what has passed. On a stand-in for a GPU no value is right.
        part tests_$tests $([ $tests = kernels ] && echo 90 || echo 60) pytest,hypothesis "$PY" -m pytest -v --tb=short \
            --import-mode=importlib -p no:cacheprovider ${rehearsed:+--collect-only} ${several} ${!tests}
    done
    real_images || return
    trained sat 50 sat:cifar10_resnet18 --epochs 3
    trained absld 45 absld:cifar10_resnet18 --teacher "$work/sat" --epochs 3
    evaluated sat_pgd20 20 sat --attacks clean,pgd20
    evaluated absld_pgd20 20 absld --attacks clean,pgd20
    # the authors' teacher in size, untrained: how long a step of training takes, not what it learns
    local make="import torch; from retemper.engine import create_model; "
    make+="torch.save(create_model('wrn34_10', 10).state_dict(), '$work/wrn34_10.pt')"
    part wrn34_10 10 - "$PY" -c "$make"
    trained absld_wrn34_10 45 absld:cifar10_resnet18 --teacher "$work/wrn34_10.pt" --epochs 2
}

real_images() { # sets `images`, the data root, and `data`, what results on them are called; fails where there are none
    local given folder source
    data=cifar10
    for given in "${CIFAR10:-}" shared/data .carry; do
        [ -z "$given" ] && continue
        images=$given
        for folder in cifar-10-batches-bin cifar-10-batches-py; do [ -e "$given/$folder" ] && return 0; done
        images=$work/images
        for source in "$given"/cifar10*.tar* "$given"/train; do
            [ -e "$source" ] || continue
            [ "${source##*/}" = train ] && source=$given
            data=cifar10_jpeg_copies
            part images 15 PIL "$PY" benchmarks/gpu_images.py "$source" "$images"
            return 0
        done
    done
    images=data # so that the list of parts is whole
    [ -n "${SUITE_LIST:-}" ] || { echo "== no CIFAR-10 images: name their folder by CIFAR10"; return 1; }
}

the_rest() {
    part ranks 60 pytest,safetensors "$PY" -m pytest -q --import-mode=importlib -p no:cacheprovider \
        tests/engine/test_ranks.py -m gpu
    local gpus=$(nvidia-smi -L 2>/dev/null | wc -l)
    if [ "$gpus" -gt 1 ]; then
        part ranks_$gpus 120 sklearn,safetensors "$PY" -m torch.distributed.run --nproc-per-node "$gpus" \
            -m retemper train absld:digits --epochs 4 --batch-size $((8 * gpus)) --out "$work/ranks"
    fi
    part sanitizer 120 compute-sanitizer! compute-sanitizer --tool memcheck --error-exitcode 1 \
        "$PY" -m retemper bench kernels --quick --rounds 1
    part profile 40 - "$PY" -m retemper bench step --profile "$RESULTS" ${SUITE_QUICK:+--quick}
    bench kernels_images 290 kernels --only "pgd_step_ " "random_start_ " "augment "
    bench kernels_epilogue 200 kernels --only "epilogue "
    bench kernels_logits 290 kernels --only class_
    bench kernels_calls 120 kernels --only "host time" "first call"
    bench sweep_images 290 kernels --sweep --only pgd_step_ random_start_ augment epilogue
    bench sweep_kl 200 kernels --sweep --only "kl forward"
    bench sweep_kl_grad 200 kernels --sweep --only kl_grad
    bench sweep_sums 200 kernels --sweep --only class_sums
    bench attack_tiny_resnet 60 attack --only tiny_resnet
    if [ -z "${SUITE_QUICK:-}" ]; then
        bench step_resnet18_ladder 290 step --batch 128 --only "ladder, resnet18" "ladder in strict fp32, resnet18"
        bench step_mobilenet_v2_ladder 290 step --batch 128 --only "ladder, mobilenet_v2" "all but one, mobilenet_v2"
        bench step_resnet18_1024 290 step --only resnet18 --batch 1024
        bench step_mobilenet_v2_1024 290 step --only mobilenet_v2 --batch 1024
        bench attack_resnet18 290 attack --only resnet18
        bench attack_mobilenet_v2 290 attack --only mobilenet_v2
    fi
    bench loaders 120 loaders
    if [ -n "${SUITE_QUICK:-}" ]; then
        part digits 60 sklearn,safetensors "$PY" -m retemper train sat:digits --epochs 1 --attack-steps 1 --out "$work/digits"
    else
        part digits 290 sklearn,safetensors "$PY" benchmarks/digits.py --seeds 1 --out "$work/digits" --json "$RESULTS/digits.json"
    fi
    for folder in "${FASHION_MNIST:-}" /usr/share/datasets/fashion-mnist /usr/share/datasets; do
        if [ -z "${SUITE_QUICK:-}" ] && [ -e "$folder/train-images-idx3-ubyte.gz" ]; then
            part fashion_mnist 290 safetensors bash -c "'$PY' -m retemper train absld:fashion_mnist_small \
                --data-root '$folder' --out '$work/fashion' && '$PY' -m retemper evaluate '$work/fashion' \
                --data-root '$folder' && cp '$work/fashion/evaluation.json' '$RESULTS/fashion_mnist.json'"
            break
        fi
    done
}

main() {
    case $which in 1) parts=how_fast ;; 2) parts=is_it_right ;; more) parts=the_rest ;; esac
    [ -n "${SUITE_LIST:-}" ] && { $parts; exit 0; }
    mkdir -p "$RESULTS" "$OUT" "$work"
    [ -e .carry/triton.tar.gz ] && [ ! -d "$TRITON_CACHE_DIR" ] &&
        mkdir -p "$TRITON_CACHE_DIR" && tar -xzf .carry/triton.tar.gz -C "$TRITON_CACHE_DIR"
    $parts
    archive
    echo "$SECONDS s; results in $RESULTS, archive $OUT/gpu_suite.tar.gz"
    echo "unpacked in benchmarks/results/<gpu>/, python benchmarks/tables.py puts them into the documents"
    [ ${#left[@]} = 0 ] || echo "left for another call of the same command: ${left[*]}"
    [ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
    exit 0
}

main # as one, so that an edit of this file does not reach a command that is running
