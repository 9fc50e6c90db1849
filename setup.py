"""Packaging of gluon_syncbn: CMake compiles the operators, setuptools does the rest."""

import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = os.path.dirname(os.path.abspath(__file__))


def constants_of(module):
    """Run a module of the package by itself; importing the package would need MXNet."""
    return runpy.run_path(os.path.join(HERE, "python", "gluon_syncbn", f"{module}.py"))


VERSION = constants_of("version")["__version__"]
COMPATIBILITY = constants_of("compatibility")
MXNET = COMPATIBILITY["MXNET"]
NUMPY = "numpy<{}.{}".format(*COMPATIBILITY["NUMPY_BELOW"])
PYTHON_FROM, PYTHON_TO = COMPATIBILITY["PYTHON_FROM"], COMPATIBILITY["PYTHON_TO"]
PYTHONS = [f"{PYTHON_FROM[0]}.{minor}" for minor in range(PYTHON_FROM[1], PYTHON_TO[1] + 1)]


def mxnet_to_require():
    """Return MXNet, unless the environment that this is installed into has one.

    mxnet and mxnet-cu112 share one folder, so requiring one would overwrite the other.  A build
    runs in an environment of its own; -I makes the interpreter look into its real one.

    A wheel for distribution cannot know where it will be installed.  GLUON_SYNCBN_ANY_MXNET=1
    leaves the choice to its user, who can make it with an extra, "cpu" or "cu112".
    """
    if os.environ.get("GLUON_SYNCBN_ANY_MXNET") == "1":
        return []
    probe = "import importlib.util as u; print(u.find_spec('mxnet') is not None)"
    found = subprocess.run([sys.executable, "-I", "-c", probe], stdout=subprocess.PIPE, text=True)
    return [] if found.stdout.strip() == "True" else [f"mxnet=={MXNET}"]


class AnyPython(bdist_wheel):
    """Tag the wheel py3-none: Python opens the library by ctypes, so one serves every Python 3."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


class CMakeBuild(build_ext):
    """Build the library with CMake and Ninja, against the MXNet that is importable here."""

    def build_extension(self, ext):
        target = os.path.dirname(os.path.abspath(self.get_ext_fullpath(ext.name)))
        mxnet = os.path.dirname(importlib.util.find_spec("mxnet").origin)
        options = [f"-DMXNET_DIR={mxnet}", f"-DGLUON_SYNCBN_LIBRARY_DIR={target}"]
        for side in ("GLUON_SYNCBN_CUDA", "GLUON_SYNCBN_MPI"):
            if side in os.environ:
                options.append(f"-D{side}={os.environ[side]}")
        build = os.path.abspath(self.build_temp)
        subprocess.check_call(["cmake", "-S", HERE, "-B", build, "-G", "Ninja", *options])
        subprocess.check_call(["cmake", "--build", build])

    def get_ext_filename(self, name):
        # Without the suffix of an extension module, which names a Python.
        *package, module = name.split(".")
        return os.path.join(*package, f"lib{module}.so")


# Not below the checkout: setuptools would pack modules that an earlier build left there, and CMake
# would find the tools of that build's environment.
BUILD = tempfile.TemporaryDirectory()

setup(
    name="gluon-syncbn",
    version=VERSION,
    description="Synchronized batch normalization for Apache MXNet Gluon",
    long_description=open(os.path.join(HERE, "README.md"), encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    author="The gluon_syncbn authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        *(f"Programming Language :: Python :: {version}" for version in PYTHONS),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    package_dir={"": "python"},
    packages=find_packages("python"),
    package_data={"gluon_syncbn": ["py.typed"]},
    options={"build": {"build_base": BUILD.name}},
    ext_modules=[Extension("gluon_syncbn.gluon_syncbn", sources=[])],
    cmdclass={"bdist_wheel": AnyPython, "build_ext": CMakeBuild},
    python_requires=f">={PYTHONS[0]},<{PYTHON_TO[0]}.{PYTHON_TO[1] + 1}",
    install_requires=[NUMPY, *mxnet_to_require()],
    extras_require={
        "cpu": [f"mxnet=={MXNET}"],
        "cu112": [f"mxnet-cu112=={MXNET}"],
        "example": ["matplotlib", "scikit-learn", "tqdm"],
        "onnx": ["onnx==1.16.2", "onnxruntime==1.19.2", "protobuf<5"],
    },
    zip_safe=False,
)
