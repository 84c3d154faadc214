#!/usr/bin/env bash
# Builds the CPU engine with AddressSanitizer and UndefinedBehaviorSanitizer in a temporary copy, and runs the tests on it.
#
#   bash tests/sanitize.sh [LEVEL ...]     default: x86_64_v3 and the best level of this CPU; with FASTATTN_EVERY=2 one of them, the other
#                                          the next day
#
# PYTHON names an interpreter with the package's dependencies and pytest, cython, setuptools (default: .venv/bin/python if there).
# Leaks are not checked: CPython frees little of its memory when it ends, and its leaks would hide ours.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then PYTHON=python3; [ -x .venv/bin/python ] && PYTHON=$PWD/.venv/bin/python; fi
levels=("$@")
if [ ${#levels[@]} = 0 ]; then
  best=$("$PYTHON" -c 'import runpy; print(runpy.run_path("fastattn/cpu/levels.py")["available"]()[-1])')
  levels=("$best")
  if [[ $best == x86_64_v[4-9]* || $best == x86_64_amx ]]; then
    levels=(x86_64_v3 "$best")
    [ "${FASTATTN_EVERY:-1}" = 1 ] || levels=("${levels[$((${FASTATTN_SEED:-$(date -u +%Y%m%d)} % 2))]}")
  fi
fi

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
tar -c --exclude='*.so' --exclude='*.c' --exclude=__pycache__ fastattn tests setup.py pyproject.toml README.md LICENSE | tar -x -C "$copy"
cd "$copy"
FASTATTN_SANITIZE=address,undefined FASTATTN_LEVELS="${levels[*]}" "$PYTHON" setup.py -q build_ext --inplace

export LD_PRELOAD="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONMALLOC=malloc FASTATTN_LEVELS="${levels[*]}" FASTATTN_FUZZ=0.15
status=0
tests() { "$PYTHON" -m pytest -q -p no:cacheprovider "$@" || status=1; }
# every feature, forward, backward and with caches, on every level: of the cases half, of tests that vary one feature a tenth, others the
# next day. What is the same code on all levels (threads, memory, signals) runs on the first. What never reaches compiled code (errors,
# the reference) does not run here.
once=(tests/cpu/test_limits.py tests/compat/test_multi_head.py)
other="not isa and not threads_from"
for level in "${levels[@]}"; do
  echo "sanitizers: $level"
  export FASTATTN_ISA=$level
  FASTATTN_EVERY=2 tests tests/test_engines.py tests/cpu/test_short.py tests/test_eight_bit.py::test_against_float64 tests/serving/test_numbers.py tests/serving/test_eight_bit.py \
    tests/fuzz/test_caches.py::test_calls_of_the_day tests/fuzz/test_fuzz.py::test_found tests/fuzz/test_fuzz.py::test_problems_of_the_day \
    -k "not reference_agrees and not reference] and not leftovers and not any_threads and not torch"
  FASTATTN_EVERY=10 tests tests/cpu/test_engine.py tests/cpu/test_flex.py tests/cpu/test_written.py "${once[@]}" -k "$other"
  once=() other="not isa and not threads and not forks and not memory"
done
exit $status
