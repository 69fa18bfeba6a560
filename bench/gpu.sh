#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build, tests, sanitizer, microbenchmarks, full-size FLUX.
#
#   OUT=results bash bench/gpu.sh                 # default OUT: bench/results
#   FASTCACHE_GPU_STAGES="compiled" bash bench/gpu.sh
#   FASTCACHE_GPU_DRY=1 bash bench/gpu.sh         # the same steps, tiny, on the CPU
#
# Needs python3 with torch, triton, ninja, pybind11, pytest, hypothesis, rich, tqdm and matplotlib, and
# nvcc; no network. Packages that are missing may lie as wheels in .whl/ (diffusers, for the last part).
# Stages: tests sanitize ops steps (the default, under 9 minutes), compiled (a call of its own). Every
# stage has a time limit, and what failed is said at the end without stopping the others.
set -uo pipefail

repo=$(cd "$(dirname "$0")/.." && pwd)
out=${OUT:-$repo/bench/results}
dry=${FASTCACHE_GPU_DRY:-0}
stages=${FASTCACHE_GPU_STAGES:-tests sanitize ops steps}
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=()
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

stage() { # stage NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS rc=0
  shift 2
  echo "== $name (at most ${limit} s)"
  timeout --kill-after=10 "$limit" "$@" || rc=$?
  echo "== $name: exit $rc after $((SECONDS - start)) s"
  [ "$rc" = 0 ] || failed+=("$name ($rc)")
  return "$rc"
}

wanted() { [[ " $stages " == *" $1 "* ]]; }

# --- what is here ----------------------------------------------------------------------------------------

if [ "$dry" = 1 ]; then
  device=cpu gpu=dry
else
  device=cuda
  "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
    echo "no GPU is visible to $python; FASTCACHE_GPU_DRY=1 runs the steps on the CPU" >&2
    exit 1
  }
  gpu=$("$python" -c 'import re, torch
print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')
  arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  export TORCH_CUDA_ARCH_LIST="$arch+PTX"
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv
fi
if [ -z "${FASTCACHE_COMMIT:-}" ]; then
  FASTCACHE_COMMIT=$(git -C "$repo" rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
fi
export FASTCACHE_COMMIT

# --- build into a scratch folder, away from the checkout -------------------------------------------------

site=$scratch/site
mkdir -p "$site" "$scratch/src" "$scratch/work"
tar -C "$repo" --exclude=./.git --exclude=./.venv --exclude=./build --exclude='./.whl' \
  --exclude='*.so' --exclude='*.egg-info' --exclude=__pycache__ -cf - . | tar -C "$scratch/src" -xf -
pip=("$python" -m pip install -q --no-index --no-deps --no-cache-dir --disable-pip-version-check)
shopt -s nullglob
wheels=("$repo"/.whl/*.whl)
if [ ${#wheels[@]} -gt 0 ]; then
  stage wheels 60 "${pip[@]}" --no-compile --upgrade --target "$site" "${wheels[@]}"
fi
[ "$dry" = 1 ] && cuda_build=0 || cuda_build=1
(
  cd "$scratch/src" &&
    FASTCACHE_BUILD_CPU=1 FASTCACHE_BUILD_CUDA=$cuda_build stage build 150 \
      "${pip[@]}" --no-build-isolation --target "$site" .
) || {
  failed+=("build")
  echo "the extension did not build: continuing with what Python alone can do" >&2
  (cd "$scratch/src" && FASTCACHE_BUILD_CPU=0 FASTCACHE_BUILD_CUDA=0 \
    "${pip[@]}" --no-build-isolation --target "$site" .)
}
# tests and benchmarks run beside the installed package, not beside the sources
cp -r "$repo/tests" "$repo/bench" "$scratch/work/"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
cd "$scratch/work" || exit 1
"$python" -m fastcache info | tee "$out/gpu-info-$gpu.txt"
has_diffusers=$("$python" -c 'import importlib.util as u; print(int(bool(u.find_spec("diffusers"))))')
[ "$has_diffusers" = 1 ] || echo "diffusers is not installed: full-size FLUX is left out"

# --- tests -----------------------------------------------------------------------------------------------

if wanted tests; then
  tests=()
  for name in test_triton_gpu test_native_cuda; do
    [ -f "tests/$name.py" ] && tests+=("tests/$name.py")
  done
  stage tests 150 bash -c 'set -o pipefail; "$0" -m pytest -q -rs -p no:cacheprovider --tb=short \
    "${@:2}" 2>&1 | tee "$1"' "$python" "$out/gpu-tests-$gpu.txt" "${tests[@]}"
fi

# --- memory and race checks ------------------------------------------------------------------------------

if wanted sanitize && [ "$dry" != 1 ]; then
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
  if [ -n "$sanitizer" ]; then
    for tool in memcheck racecheck; do
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" 60 "$sanitizer" --tool "$tool" \
        --error-exitcode 9 --print-limit 5 --log-file "$scratch/$tool.txt" \
        "$python" -m bench.exercise
      { echo "== $tool"; tail -n 20 "$scratch/$tool.txt"; } >>"$out/gpu-sanitizer-$gpu.txt" 2>/dev/null
    done
  else
    echo "compute-sanitizer is not on this machine: left out"
  fi
fi

# --- microbenchmarks -------------------------------------------------------------------------------------

if wanted ops; then
  size=(--large)
  [ "$dry" = 1 ] && size=(--quick)
  # torch.compile only where a bound is set on it: compiling takes longer than everything else
  stage ops 170 "$python" -m bench ops --device "$device" "${size[@]}" \
    --compile "residual_l1 + store" "of 3" --json "$out/ops-$gpu.jsonl"
fi

# --- whole steps of full-size FLUX, random weights, bf16 -------------------------------------------------

model=(--model flux --batch 1 --tokens 4096 --rounds 2 --device "$device")
[ "$dry" = 1 ] && model=(--quick)
if wanted steps && [ "$has_diffusers" = 1 ]; then
  stage steps 170 "$python" -m bench steps "${model[@]}" --budget 120 --json "$out/steps-$gpu.jsonl"
fi
if wanted compiled && [ "$has_diffusers" = 1 ]; then
  stage compiled 400 "$python" -m bench steps "${model[@]}" --mode compiled --budget 330 \
    --json "$out/steps-compiled-$gpu.jsonl"
fi

echo "== results in $out"
ls -l "$out"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
