#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One run on a GPU, in stages: what bench/gpu/table.py lists, each cut off at its limit, every number
# on disk the moment it is measured.
#
#   bash bench/gpu.sh                             the first call: all stages, under ten minutes
#   bash bench/gpu.sh second                      the second: trains the picture model and evaluates it
#   bash bench/gpu.sh kernels runs                some stages
#   FASTCACHE_GPU_DRY=1 bash bench/gpu.sh         the same steps, tiny, on the CPU
#
# OUT               folder of results: gpu-DEVICE.jsonl and a log (bench/results)
# PYTHON            the interpreter (python3): torch, triton, pytest, hypothesis, rich, tqdm, numpy
# FASTCACHE_COMMIT  what was checked out, where there is no git
# FASTCACHE_GPU_SECONDS  all ends by then (585); with less, the last stages are the ones that are cut
#
# On a machine without a network `make gpu-kit` goes first, here; it leaves .gpu-kit (at most 8 files,
# 16 MiB), which travels with the sources. Nothing else does. Then there, as one command with at least
# 600 seconds, $OUT being the folder that comes back:
#
#   carry:    .gpu-kit
#   command:  FASTCACHE_COMMIT=<git rev-parse --short=12 HEAD> OUT=$OUT bash bench/gpu.sh
#   then:     FASTCACHE_COMMIT=<the same> OUT=$OUT bash bench/gpu.sh second
#
# Exit 1 where any stage failed; rows of the stage "run" say which, and why.
set -uo pipefail

dry=${FASTCACHE_GPU_DRY:-0}
until=$(($(date +%s) + ${FASTCACHE_GPU_SECONDS:-$([ "$dry" = 1 ] && echo 3600 || echo 585)}))
repo=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$repo/bench/results}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT

device=cuda
[ "$dry" = 1 ] && device=cpu
if [ -z "${FASTCACHE_COMMIT:-}" ]; then
  FASTCACHE_COMMIT=$(git -C "$repo" rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
fi
export FASTCACHE_COMMIT PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

# sources, libraries, compiled kernels and wheels, away from the checkout, which has no built package
(cd "$repo" && "$python" -m bench.gpu.kit unpack .gpu-kit "$repo" "$room") || exit 1
export PYTHONPATH="$room/site${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_CACHE_DIR=$room/triton TORCHINDUCTOR_CACHE_DIR=$room/inductor
cd "$room/work" || exit 1
"$python" -m bench.gpu --device "$device" --out "$out" --until "$until" --repo "$repo" \
  --kit "$room/kit.json" "$@" 2>&1 | tee "$out/gpu-log.txt"
exit "${PIPESTATUS[0]}"
