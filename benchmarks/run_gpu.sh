#!/usr/bin/env bash
# Builds, tests and measures on a machine with an NVIDIA GPU, without a network: one command, one
# table last. Needs nvcc, cmake, ninja, a Python with torch, scikit-build-core and pybind11, and for
# the C++ tests GoogleTest (GTest_ROOT says where, if not installed).
#
#   benchmarks/run_gpu.sh [--quick] [--sanitize] [--micro] [--build DIR] [ARGUMENTS OF qwen-moe bench]
#
# --quick leaves out Python tests that are marked slow.
# Without arguments for it the bench takes the shapes of 35B-A3B in int4. --micro adds what one phase
# and one GEMV cost, --sanitize runs the tests over the smallest model under compute-sanitizer.
# A step that fails does not stop those that can still run; the exit status is 1 then.
set -euo pipefail
cd "$(dirname "$0")/.."

sanitize=false
micro=false
python_tests=gpu
build=$PWD/build/gpu
while (($#)); do
  case $1 in
    --sanitize) sanitize=true && shift ;;
    --micro) micro=true && shift ;;
    --quick) python_tests="gpu and not slow" && shift ;;
    --build) build=$(realpath -m "$2") && shift 2 ;;
    --) shift && break ;;
    *) break ;;
  esac
done
(($#)) || set -- --preset 35b-a3b --quantize int4 --prompt-tokens 512 --decode-tokens 48 \
  --long-context 32768 --prompts 128,512,1024,4096,8192,32768
mkdir -p "$build"
rm -f "$build"/*.figures
jobs=$(nproc)

rows=()
failed=0
record() { rows+=("$1|$2|$3"); } # step, outcome, seconds
# step NAME COMMAND...: runs it; exit status 77 means skipped.
step() {
  local name=$1 begin=$SECONDS status=0
  shift
  printf '\n=== %s (%d s)\n' "$name" "$SECONDS"
  "$@" || status=$?
  case $status in
    0) record "$name" ok $((SECONDS - begin)) ;;
    77) record "$name" skipped $((SECONDS - begin)) ;;
    *) failed=1 && record "$name" "FAILED ($status)" $((SECONDS - begin)) ;;
  esac
  return 0
}
table() {
  printf '\n%-32s %-14s %s\n' step outcome seconds
  printf '%s\n' "${rows[@]}" | while IFS='|' read -r name outcome seconds; do
    printf '%-32s %-14s %7d\n' "$name" "$outcome" "$seconds"
  done
}
figures() { for file in "$build"/*.figures; do [[ -e $file ]] && printf '\n' && cat "$file"; done; }
trap 'figures; table' EXIT

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
# "native" would leave out what only the architecture-specific target of a Hopper has.
architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
[[ $architecture == 90 ]] && architecture=90a
export CUDAARCHS=$architecture-real
export CMAKE_BUILD_PARALLEL_LEVEL=$jobs
if [[ -z ${CUDACXX:-} ]] && ! command -v nvcc >/dev/null && [[ -x /usr/local/cuda/bin/nvcc ]]; then
  export CUDACXX=/usr/local/cuda/bin/nvcc
fi
printf '%s, compiling for %s\n' "$gpu" "$CUDAARCHS"

# One build for the package, the C++ tests and the benchmarks. Without GoogleTest the tests are left
# out. -lineinfo lets compute-sanitizer name source lines; it changes no instruction.
have_tests=true
install_with() {
  python3 -m pip install -q --no-build-isolation --no-deps . -C build-dir="$build/package" \
    -C cmake.define.QWEN_MOE_CUDA=ON -C cmake.define.QWEN_MOE_BENCHMARKS=ON \
    -C cmake.define.CMAKE_CUDA_FLAGS=-lineinfo -C cmake.define.BUILD_TESTING="$1" \
    >"$build/install.log" 2>&1
}
install_package() {
  install_with ON && return
  if grep -q "Could NOT find GTest" "$build/install.log"; then
    have_tests=false
    echo "no GoogleTest: C++ tests are left out; set GTest_ROOT to a build of it"
    install_with OFF && return
  fi
  tail -n 30 "$build/install.log"
  return 1
}
step "build and install" install_package

# Names of the programs made from FOLDER/PATTERN.
programs() { for source in $1/$2; do [[ -e $source ]] && basename "${source%.cu}"; done; }
benches=()
$micro && benches=(bench_gpu_phases bench_gpu_gemv)
tests=()
$have_tests && mapfile -t tests < <(programs tests/cuda 'test_*.cu')

# What the prefill tests launch; without Triton they skip.
export QWEN_MOE_KERNEL_IMAGES=$build/kernel_images
compile_kernels() {
  python3 -c 'import triton' || return 77
  python3 python/qwen_moe/kernels/standalone.py --arch "${architecture%a}" --jobs "$jobs" \
    --out "$QWEN_MOE_KERNEL_IMAGES"
}
step "compile prefill kernels" compile_kernels
[[ -e $QWEN_MOE_KERNEL_IMAGES/manifest.json ]] || unset QWEN_MOE_KERNEL_IMAGES

# Side by side, as most of their time goes to the CPU that they compare with; but for the one that
# compares how much memory is free.
begin=$SECONDS
printf '\n=== C++ GPU tests (%d s)\n' "$SECONDS"
for name in ${tests[@]+"${tests[@]}"}; do
  [[ $name == test_cuda_weights ]] && wait
  { status=0 && { "$build/package/$name" --gtest_brief=1 || status=$?; } &&
    echo "$status" >"$build/$name.status"; } >"$build/$name.log" 2>&1 &
done
wait
for name in ${tests[@]+"${tests[@]}"}; do
  status=$(cat "$build/$name.status")
  if [[ $status == 0 ]]; then
    record "$name" ok $((SECONDS - begin))
  else
    failed=1 && record "$name" "FAILED ($status)" $((SECONDS - begin))
    tail -n 40 "$build/$name.log"
  fi
done
$have_tests || record "C++ GPU tests" skipped 0

python_tests() {
  local status=0
  python3 -m pytest -q -m "$python_tests" tests || status=$?
  ((status == 5)) && return 77 # none collected
  return $status
}
step "pytest -m gpu" python_tests

# Slow: every access is checked, so the shapes of large models are left out. Exits 77 where the tool does not support the machine.
small='-*Model35b*:*Model122b*:*Model397b*'
sanitized() {
  local tool=$1 name=$2 status=0
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer" && return 77; }
  compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 "$build/package/$name" \
    --gtest_brief=1 --gtest_filter="$small" 2>&1 | tee "$build/$tool-$name.log" |
    tail -n 40 || status=$?
  ((status)) && grep -q "Device not supported" "$build/$tool-$name.log" && return 77
  return $status
}
if $sanitize; then
  for name in ${tests[@]+"${tests[@]}"}; do
    step "memcheck $name" sanitized memcheck "$name"
    step "racecheck $name" sanitized racecheck "$name"
  done
fi

label=$(tr 'A-Z ' 'a-z-' <<<"$gpu" | tr -cd 'a-z0-9-')
date=$(date -u +%F)
# measured NAME COMMAND...: a step whose output is printed again at the end.
measured() { step "$1" figures_of "$@"; }
figures_of() { "${@:2}" 2>&1 | tee "$build/${1// /-}.figures"; }
results=benchmarks/results/$label
for name in ${benches[@]+"${benches[@]}"}; do
  step "$name" "$build/package/$name"
done
measured "decode ops" "$build/package/bench_gpu_ops" --json "$results-ops-$date.json"
# One long timeline among short ones: they share every attention kernel.
measured "one long session" "$build/package/bench_gpu_ops" --rows 8,64 --context 32900 \
  --others 600 --only attention
measured "prefill kernels" python3 benchmarks/bench_prefill_kernels.py \
  --json "$results-prefill-$date.json"
room=$(df --output=avail -B1G /dev/shm 2>/dev/null | tail -n 1 || echo 0)
((room >= 40)) && files=/dev/shm || files=${TMPDIR:-/tmp}
measured "loading" python3 benchmarks/bench_load.py --preset 35b-a3b --device cuda --layers 4 \
  --repeat 2 --dir "$files" \
  --json "$results-load-$date.json"
measured "qwen-moe bench" python3 -m qwen_moe bench --device cuda --json "$results-$date.json" "$@"

exit $failed
