#!/usr/bin/env bash
# The two commands of gpu_suite.sh on a machine without a GPU, from end to end: every part runs on a recorder of CUDA's
# calls, which computes nothing, so that values are not checked and times say nothing.
#
#   benchmarks/gpu_rehearsal.sh COMMAND...    COMMAND is what starts a Python on the recorder
#
# Then .carry/ holds what the commands want to find beside the checkout on a machine with a GPU: Triton's cache, so that
# little is compiled there, the commit, and the archive of images that CIFAR10 names.
#
#   GOES_ON=1            do not repeat the parts that an earlier rehearsal has done
#   TRITON_WHEEL=FILE    the wheel of the Triton there, where its Python is another: the cache's key depends on it
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { echo "usage: benchmarks/gpu_rehearsal.sh COMMAND..." >&2; exit 2; }
export RETEMPER_REHEARSAL=1 RESULTS=${RESULTS:-$PWD/runs/gpu_rehearsal} TRITON_CACHE_DIR=/tmp/retemper-triton
export PYTHONPATH=$PWD/benchmarks/rehearsal${PYTHONPATH:+:$PYTHONPATH} PYTHON=$RESULTS/python
unset OUT
[ -n "${GOES_ON:-}" ] || rm -rf "$RESULTS"
mkdir -p "$RESULTS" .carry
printf '#!/usr/bin/env bash\nexec %s "$@"\n' "$(printf '%q ' "$@")" >"$PYTHON"
chmod +x "$PYTHON"
if [ -n "${TRITON_WHEEL:-}" ]; then
    library=$RESULTS/libtriton.so
    python3 -c 'import sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(name for name in wheel.namelist() if "/_C/libtriton" in name)
    open(sys.argv[2], "wb").write(wheel.read(name))' "$TRITON_WHEEL" "$library" || exit
    export RETEMPER_TRITON_LIBRARY=$library
fi
code=0
for command in 1 2; do SUITE_SECONDS=${SUITE_SECONDS:-1200} bash benchmarks/gpu_suite.sh $command || code=1; done
# what a cubin is made from stays behind
find "$TRITON_CACHE_DIR" \( -name '*.cubin' -o -name '*.json' \) -printf '%P\0' |
    tar -C "$TRITON_CACHE_DIR" --null --files-from=- -czf .carry/triton.tar.gz
git rev-parse HEAD >.carry/commit
find "${CIFAR10:-.}" -maxdepth 1 -name 'cifar10*.tar*' -exec cp -u {} .carry/ \;
du -sh .carry/*
exit $code
