"""Packaging of gluon_syncbn: CMake compiles the operators, setuptools does the rest."""

import importlib.util
import os
import subprocess
import sys
import tempfile

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = os.path.dirname(os.path.abspath(__file__))
MXNET = "1.9.1"


def mxnet_to_require():
    """MXNet, unless the environment that we are installed into has one.

    mxnet and mxnet-cu112 share one folder, so requiring the one would overwrite the other.  A build
    runs in an environment of its own; -I makes the interpreter look into its real one.
    """
    probe = "import importlib.util as u; print(u.find_spec('mxnet') is not None)"
    found = subprocess.run([sys.executable, "-I", "-c", probe], stdout=subprocess.PIPE, text=True)
    return [] if found.stdout.strip() == "True" else [f"mxnet=={MXNET}"]


class CMakeBuild(build_ext):
    """Builds the library with CMake and Ninja, against the MXNet that is importable here."""

    def build_extension(self, ext):
        target = os.path.dirname(os.path.abspath(self.get_ext_fullpath(ext.name)))
        mxnet = os.path.dirname(importlib.util.find_spec("mxnet").origin)
        options = [f"-DMXNET_DIR={mxnet}", f"-DGLUON_SYNCBN_LIBRARY_DIR={target}"]
        if "GLUON_SYNCBN_CUDA" in os.environ:
            options.append(f"-DGLUON_SYNCBN_CUDA={os.environ['GLUON_SYNCBN_CUDA']}")
        # Not below the checkout: CMake would find the tools of an earlier build's environment.
        with tempfile.TemporaryDirectory() as build:
            subprocess.check_call(["cmake", "-S", HERE, "-B", build, "-G", "Ninja", *options])
            subprocess.check_call(["cmake", "--build", build])

    def get_ext_filename(self, name):
        # No Python in it: one library serves every Python.
        *package, module = name.split(".")
        return os.path.join(*package, f"lib{module}.so")


setup(
    name="gluon-syncbn",
    version="0.1.0",
    description="Synchronized batch normalization for Apache MXNet Gluon",
    long_description=open(os.path.join(HERE, "README.md"), encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    package_dir={"": "python"},
    packages=["gluon_syncbn"],
    ext_modules=[Extension("gluon_syncbn.gluon_syncbn", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    python_requires=">=3.8,<3.12",
    install_requires=["numpy<1.24", *mxnet_to_require()],
    extras_require={
        "example": ["matplotlib", "scikit-learn", "tqdm"],
        "onnx": ["onnx==1.16.2", "onnxruntime==1.19.2", "protobuf<5"],
        "test": ["pytest", "ruff==0.8.4", "clang-format==18.1.8"],
    },
    zip_safe=False,
)
