#!/usr/bin/env bash
# compute-sanitizer over the small problems, each kernel family: memory errors first, then races in shared memory. About three minutes.
#
#   bash tests/gpu_sanitize.sh [TOOL ...]     default: memcheck racecheck; also synccheck, initcheck
#
# PYTHON names the interpreter (default: .venv/bin/python if there). TESTS is a -k expression (default: test_small). The arrays come straight
# from the driver, not from torch's pool, so that an access past the end of an array is an error.
set -uo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then PYTHON=python3; [ -x .venv/bin/python ] && PYTHON=$PWD/.venv/bin/python; fi
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
[ -n "$sanitizer" ] || { echo "compute-sanitizer is not here; it comes with the CUDA toolkit"; exit 1; }
tools=("$@")
[ ${#tools[@]} = 0 ] && tools=(memcheck racecheck)

export FASTATTN_TEST_TORCH=0
run=("$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu/test_forward.py tests/gpu/test_backward.py -k "${TESTS:-test_small}")
"${run[@]}" || { echo "the tests fail without a sanitizer too"; exit 1; }     # and compiles the kernels, at full speed
status=0
for tool in "${tools[@]}"; do
  echo "compute-sanitizer: $tool"
  start=$SECONDS
  timeout 600 "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 "${run[@]}" || status=1
  echo "compute-sanitizer: $tool: $((SECONDS - start)) s"
done
exit $status
