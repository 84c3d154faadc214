#!/usr/bin/env bash
# Everything that needs a GPU, in one go: builds in place, runs the GPU tests, then the quick benchmark,
# whose table is printed last. Installs nothing; needs a Python with torch, numba-cuda, cuda-core, Cython, pytest and a C compiler.
#   tests/device_run.sh [--no-tests] [--sanitize] [--no-bench] [arguments of `python -m bench gpu --quick`, e.g. --skip-fa4, --backward]
# Environment: PYTHON (python3), OUT (./out) for logs, CSV and plot, PYTEST_ARGS, SANITIZE_TESTS (small: a -k expression),
# FASTATTN_LEVELS (baseline).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-out}
tests=1 sanitize=0 bench=1
while [ $# -gt 0 ]; do
  case $1 in
    --no-tests) tests=0 ;;
    --sanitize) sanitize=1 ;;
    --no-bench) bench=0 ;;
    *) break ;;
  esac
  shift
done
mkdir -p "$out"
status=0
start=$SECONDS
step() { # name, command...: output to a log; its last lines and its time here
  local name=$1 began=$SECONDS code
  shift
  "$@" >"$out/$name.log" 2>&1
  code=$?
  echo "== $name: exit status $code, $((SECONDS - began)) s"
  [ "$code" = 0 ] && tail -n 2 "$out/$name.log" || tail -n 25 "$out/$name.log"
  [ "$code" = 0 ] || status=1
  return "$code"
}

# One instruction-set level is enough here, and every later step has to ask for it. What is built and unchanged is not built again.
export FASTATTN_LEVELS=${FASTATTN_LEVELS:-baseline}
export FASTATTN_ISA=${FASTATTN_ISA:-${FASTATTN_LEVELS%%[ ,]*}} PYTHONUNBUFFERED=1
step build "$python" setup.py build_ext --inplace || "$python" -c "import fastattn.cpu" || exit 1

if [ "$tests" = 1 ]; then
  # shellcheck disable=SC2086
  step tests "$python" -m pytest -q -p no:cacheprovider ${PYTEST_ARGS:-} tests/gpu
fi

if [ "$sanitize" = 1 ]; then
  # The small problems only: the sanitizer makes a kernel a hundred times slower. Leaks of torch's own pools are not ours.
  for tool in memcheck racecheck; do
    step "sanitize-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$python" -m pytest -q -x -p no:cacheprovider -k "${SANITIZE_TESTS:-small}" tests/gpu
  done
fi

echo "== $((SECONDS - start)) s until here; logs in $out"
if [ "$bench" = 1 ]; then
  # A line per case while it runs, the table last; rows are in the CSV as they come, should the time run out.
  "$python" -m bench gpu --quick --csv "$out/gpu-quick.csv" "$@" 2>&1 | tee "$out/bench.log"
  [ "${PIPESTATUS[0]}" = 0 ] || status=1
fi
exit "$status"
