#!/usr/bin/env bash
# Packs what a GPU machine without network lacks into parts of at most 60 MiB each.
#
#   benchmarks/gpu/bundle.sh FOLDER [PYTHON_VERSION=3.12] [PACKAGE...]    on a machine with network;
#       the packages are there already: those that torch brings are nvidia-cuda-nvrtc, scipy and others
#   for p in FOLDER/*.tar.xz; do tar -xJf $p -C SITE; done      on the GPU machine
#   PYTHONPATH=SITE make gpu-check PYTHON=python3
#
# That machine has: the NVIDIA driver, Python of that version, numpy, onnxruntime, pytest, make, xz,
# binutils or gcc. What else is there, torch too, is left as it is: SITE comes first on the path.
set -euo pipefail
out=${1:?usage: bundle.sh FOLDER [PYTHON_VERSION] [PACKAGE...]}
version=${2:-3.12}
there=" ${*:3} "
here=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" "$work/wheels"

# The pins are pyproject.toml's; packages that only other parts need (Ray, matplotlib) stay away.
mapfile -t wanted < <(python3 - "$here/pyproject.toml" <<'END'
import re, sys
text = open(sys.argv[1]).read()
needed = re.findall(r'^    "([^"]+)",$', text, re.M)
away = ("ray", "matplotlib", "numpy", "onnxruntime")
print("\n".join(n for n in needed if re.split("[=><]", n)[0] not in away))
END
)
platforms=()
for tag in 2_39 2_35 2_34 2_31 2_28 2_27 2_26 2_24 2_17 2014 1; do
    case $tag in 2_*) tag=_$tag ;; esac
    platforms+=(--platform "manylinux${tag}_x86_64")
done
more=(scipy protobuf ml_dtypes typing_extensions markdown-it-py mdurl pygments cuda-pathfinder)
for each in "${wanted[@]}" "${more[@]}"; do
    [[ $there != *" ${each%%[=<>]*} "* ]] || continue
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --implementation cp --python-version "$version" "${platforms[@]}" -d "$work/wheels" "$each"
done
mkdir "$work/all"
for wheel in "$work"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$work/all"; done
chmod -R u+rwX,go+rX "$work/all"
# Not needed to tune, and large.
rm -rf "$work"/all/nvidia/cu13/lib/{*.alt.so*,*.a} "$work"/all/scipy/*/tests \
    "$work"/all/tvm/{web,3rdparty/cutlass,3rdparty/cutlass_fpA_intB_gemm,3rdparty/flash-attn}

part() { # part NAME PATH...: one archive of these, which then are gone
    local name=$1
    shift
    (cd "$work/all" && tar -cf - "$@" | xz -T0 -6e) > "$out/$name.tar.xz"
    (cd "$work/all" && rm -rf "$@")
    local bytes
    bytes=$(stat -c %s "$out/$name.tar.xz")
    echo "$name: $((bytes / 1048576)) MiB"
    [ "$bytes" -le 62914560 ] || { echo "$name is over 60 MiB" >&2; exit 1; }
}
part 1-tvm tvm/lib/libtvm_compiler.so
part 2-nvidia nvidia
part 3-rest $(ls "$work/all")
