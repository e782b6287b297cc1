#!/bin/sh
# Builds the CPU core with AddressSanitizer and UndefinedBehaviorSanitizer (float-to-int conversions
# included) in a temporary copy of the checkout and runs tests on it. Any report ends the run.
#
#     tools/sanitize.sh [pytest arguments]     PYTHON=.venv/bin/python by default; needs GCC
#
# Without arguments: the tests that drive the kernels hardest, a few minutes. Limits on memory,
# guard pages and counts of threads do not go together with a sanitizer and are left out.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT

cd "$root"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$copy"
cd "$copy"

# A compiler that has the last word: its flags come behind those of setup.py, and nothing is stripped.
# Python's -fwrapv would make signed overflow legal, and nobody would look for it.
cat >compiler <<'END'
#!/bin/bash
for argument; do
  shift
  [ "$argument" = -Wl,-s ] || set -- "$@" "$argument"
done
exec g++ "$@" -O1 -g -fno-omit-frame-pointer -fno-wrapv -fno-sanitize-recover=all \
  -fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr
END
chmod +x compiler
CC="$copy/compiler" CXX="$copy/compiler" DCNLIB_CUDA=0 "$python" setup.py -q build_ext --inplace

if [ $# -eq 0 ]; then
  set -- tests/backends/test_cpu.py tests/test_lattice.py tests/test_values.py tests/test_hostile.py \
    tests/test_functional.py tests/test_threads.py \
    -k "not settings and not affinity and not region and not small_problems and not huge_argument"
fi
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1
PYTHONPATH="$copy" "$python" -m pytest -q -p no:cacheprovider -x "$@"
