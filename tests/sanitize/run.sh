#!/usr/bin/env bash
# Builds the exchange, the all-reduce between processes, the kernels and a stress of each under GCC's
# sanitizers and runs them; then runs tests inside MXNet with the library under AddressSanitizer.
#
#   tests/sanitize/run.sh PYTHON MXNET_DIR [SEED]    (make sanitize)
set -euo pipefail
python=$1 mxnet=$2 seed=${3:-$RANDOM}
cd "$(dirname "$0")/../.."
out=build/sanitize
mkdir -p $out
exchange=(src/operator/exchange/*.cc)
common=(-std=c++17 -g -fno-sanitize-recover=all -Isrc/operator -fopenmp -pthread)

stress() {  # name sanitizers
  local dir=$out/${2//,/-}
  mkdir -p "$dir"
  local flags=("${common[@]}" -O1 "-fsanitize=$2")
  g++ "${flags[@]}" tests/sanitize/exchange_stress.cc "${exchange[@]}" -o "$dir/exchange_stress"
  for chaos in chaos late; do
    g++ "${flags[@]}" tests/operator/exchange/$chaos.cc "${exchange[@]}" -o "$dir/$chaos"
  done
  g++ "${flags[@]}" tests/sanitize/processes_stress.cc \
    src/operator/processes/process_all_reduce.cc -o "$dir/processes_stress"
  local objects=() loops=(baseline) defines=()
  if [ "$(uname -m)" = x86_64 ]; then
    loops+=(avx2 avx512)
    defines=(-DGLUON_SYNCBN_X86_LOOPS=1)
  fi
  for loop in "${loops[@]}"; do
    local machine=()
    [ $loop = baseline ] || machine=(-mavx2 -mfma -mf16c)
    [ $loop != avx512 ] || machine+=(-mavx512f -mavx512bw -mavx512dq -mavx512vl)
    g++ "${flags[@]}" "${defines[@]}" "${machine[@]}" -c src/operator/kernels/cpu/loops_$loop.cc -o "$dir/$loop.o"
    objects+=("$dir/$loop.o")
  done
  g++ "${flags[@]}" "${defines[@]}" tests/sanitize/kernels_stress.cc \
    src/operator/kernels/cpu/{batch_norm,moving_average}_kernels.cc \
    src/operator/kernels/cpu/{local_batch_norm,weighted_moments,worker_pool}.cc "${objects[@]}" \
    -o "$dir/kernels_stress"
  echo "== $1"
  "$dir/exchange_stress" "$seed"
  "$dir/chaos" "$seed" 5000  # rounds
  "$dir/late" "$seed" 50  # batches of 18 calls
  "$dir/processes_stress" "$seed"
  "$dir/kernels_stress" "$seed"
}

stress ThreadSanitizer thread
stress "AddressSanitizer and UndefinedBehaviorSanitizer" address,undefined

echo "== AddressSanitizer inside MXNet"
package=$out/python/gluon_syncbn
mkdir -p "$(dirname $package)"
rm -rf $package
cp -r python/gluon_syncbn $package
rm -f $package/*.so
cmake -S . -B $out/mxnet -G Ninja -DMXNET_DIR="$mxnet" -DGLUON_SYNCBN_CUDA=OFF \
  -DGLUON_SYNCBN_LIBRARY_DIR="$PWD/$package" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCMAKE_CXX_FLAGS="-fsanitize=address" >/dev/null
cmake --build $out/mxnet --target gluon_syncbn
# MXNet and Python leak by design.  The C++ library comes along because MXNet throws through it.
inside_mxnet() {
  PYTHONPATH="$PWD/$out/python" \
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 PYTHONMALLOC=malloc \
    "$python" -m pytest -q -p no:cacheprovider "$@"
}
inside_mxnet tests/operator/exchange/test_key_barrier.py \
  tests/test_passes.py tests/operator/adapter/test_in_place.py tests/test_sync_batch_norm.py \
  tests/operator/adapter/test_activation.py tests/operator/adapter/test_weights.py \
  tests/test_renormalization.py tests/test_moving_average.py tests/test_groups.py
# Feature maps in MKL-DNN's layouts: the cases that run in one process each, and not on every CPU.
inside_mxnet tests/operator/adapter/test_mkldnn_layouts.py \
  -k "they_are_on or moving_averages or widest or ends_well"
