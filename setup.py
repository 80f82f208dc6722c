"""Drives CMake and Ninja for ``pip install``. What is built, and how, is in CMakeLists.txt."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPTIONS = ("TOKENPRUNE_CUDA", "TOKENPRUNE_CUDA_ARCHS")  # environment variables handed on to CMake


class CMakeBuild(build_ext):
    """Builds the libraries of CMakeLists.txt into the package: into the wheel, or beside the sources when editable."""

    def run(self) -> None:
        build = Path(self.build_temp).resolve()
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "tokenprune_ext"
        options = [f"-D{name}={os.environ[name]}" for name in OPTIONS if os.environ.get(name)]
        configure = [
            # --fresh: an earlier build has cached the paths of a build environment that is gone, and old options.
            *("cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            *options,
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        for stale in package.glob("_*.so"):  # of an earlier build, perhaps with other options
            stale.unlink()
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(package)], check=True)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "tokenprune_ext"
        return [str(path) for path in package.glob("_*.so")]


setup(
    # No sources here: the entry makes setuptools run build_ext and tag the wheel with the Python it is for.
    ext_modules=[Extension("tokenprune_ext._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
