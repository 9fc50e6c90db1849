"""Make mxnet-cu112 importable where CUDA's libraries and its driver are missing.

    python tests/helpers/cuda_standins.py FOLDER

writes into FOLDER a library for each that this environment's libmxnet.so needs and the machine does
not have.  All their functions return 0 and do nothing, so with LD_LIBRARY_PATH=FOLDER MXNet's CUDA
build works on CPU contexts.  CUDA's runtime is no stand-in: it is nvidia-cuda-runtime-cu11's.
"""

import importlib.util
import pathlib
import subprocess
import sys
import tempfile

# library -> what the names of its functions begin with
LIBRARIES = {
    "libcuda.so.1": "cu",
    "libcudnn.so.8": "cudnn",
    "libcublas.so.11": "cublas",
    "libcufft.so.10": "cufft",
    "libcusolver.so.11": "cusolver",
    "libcurand.so.10": "curand",
    "libnvrtc.so.11.2": "nvrtc",
    "libnccl.so.2": "nccl",
    "libnvToolsExt.so.1": "nvtx",
}


def undefined_symbols(library):
    """Give {symbol: version} of what a library wants from others; "" where it names no version."""
    command = ["nm", "-D", "--undefined-only", str(library)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    wanted = (line.split()[-1].partition("@") for line in listed.splitlines())
    return {symbol: version for symbol, _, version in wanted}


def belongs_to(symbol, prefix):
    """The driver's functions are cuSomething; cudaSomething and cublasSomething are others'."""
    after = symbol[len(prefix) :]
    return symbol.startswith(prefix) and (prefix != "cu" or after[:1].isupper())


def make_library(path, symbols):
    with tempfile.TemporaryDirectory() as folder:
        source, versions = pathlib.Path(folder, "standin.c"), pathlib.Path(folder, "standin.map")
        source.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in symbols))
        named = sorted(set(symbols.values()) - {""})
        versions.write_text("".join(f"{version} {{ global: *; }};\n" for version in named))
        script = [f"-Wl,--version-script={versions}"] if named else []
        command = ["cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{path.name}", *script]
        subprocess.run([*command, "-o", str(path), str(source)], check=True)


def main(folder):
    site = pathlib.Path(importlib.util.find_spec("mxnet").origin).parent.parent
    folder.mkdir(parents=True, exist_ok=True)
    wanted = undefined_symbols(site / "mxnet" / "libmxnet.so")
    for name, prefix in LIBRARIES.items():
        mine = {s: version for s, version in wanted.items() if belongs_to(s, prefix)}
        make_library(folder / name, mine)
    for runtime in (site / "nvidia" / "cuda_runtime" / "lib").glob("libcudart.so*"):
        link = folder / runtime.name
        if not link.exists():
            link.symlink_to(runtime)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
