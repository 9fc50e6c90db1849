"""GPUs for tests, where there is none: our CUDA code and CUDA's runtime, compiled for the CPU.

    python tests/helpers/emulated_cuda.py FOLDER

writes FOLDER/lib/libcudart.so.11.0, on which MXNet's CUDA build runs (with cuda_standins.py's
libraries), and FOLDER/python/gluon_syncbn, this package with a CUDA side for it.  Then, with
EMULATED_GPUS=2, say, there are mx.gpu(0) and mx.gpu(1), which run our operators and copies, but
no operator of MXNet's own.  See cuda_emulation/runtime.cc.
"""

import pathlib
import shutil
import subprocess
import sys

from paths import OPERATOR, PACKAGE, TESTS

SOURCES = TESTS / "cuda_emulation"
KERNELS = ["kernels.cc", "moving_average_kernels.cc", "weighted_moments.cc"]
FLAGS = "-std=c++17 -O2 -Wall -Wextra -Werror -Wno-unknown-pragmas -shared -fPIC -pthread".split()
# A GPU does not forgive an access that is not aligned; a CPU would.
FLAGS += "-fsanitize=undefined -fno-sanitize-recover=all".split()


def compile_library(path, sources, *options):
    path.parent.mkdir(parents=True, exist_ok=True)
    sources = [SOURCES / name for name in sources]
    command = [
        "c++",
        *FLAGS,
        f"-I{SOURCES}",
        f"-I{OPERATOR}",
        f"-Wl,-soname,{path.name}",
        *sources,
        *options,
    ]
    subprocess.run([*map(str, command), "-o", str(path)], check=True)
    return path


def build_alone(folder):
    """One library with everything: to call our C functions without MXNet."""
    # Symbolic: in mxnet-cu112 there is a CUDA runtime already.
    return compile_library(folder / "emulated.so", [*KERNELS, "runtime.cc"], "-Wl,-Bsymbolic")


def main(folder):
    runtime = compile_library(
        folder / "lib" / "libcudart.so.11.0",
        ["runtime.cc"],
        f"-Wl,--version-script={SOURCES / 'runtime.map'}",
    )
    package = folder / "python" / "gluon_syncbn"
    shutil.rmtree(package, ignore_errors=True)
    ignore = shutil.ignore_patterns("libgluon_syncbn_cuda.so", "__pycache__")
    shutil.copytree(PACKAGE, package, ignore=ignore)
    compile_library(package / "libgluon_syncbn_cuda.so", KERNELS, runtime)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
