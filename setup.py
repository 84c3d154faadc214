"""Builds the CPU engine: every file of fastattn/cpu/isa is the same Cython source, compiled for one instruction set."""
import importlib.util
import os
import pathlib

from setuptools import Extension, setup

here = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("levels", here / "fastattn" / "cpu" / "levels.py")
levels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(levels)

sanitize = os.environ.get("FASTATTN_SANITIZE")  # e.g. "address,undefined"
extra = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"] if sanitize else ["-g0"]
strip = [] if os.environ.get("FASTATTN_SYMBOLS") else ["-s"]  # keep symbols for a profiler
link = ["-fopenmp", *([f"-fsanitize={sanitize}"] if sanitize else strip)]
sources = [str(p.relative_to(here)) for p in sorted((here / "fastattn" / "cpu").glob("*.[hp]*")) if p.suffix in (".h", ".pxi")]

extensions = [
    Extension(f"fastattn.cpu.isa.{level}", [f"fastattn/cpu/isa/{level}.pyx"], include_dirs=["fastattn/cpu"], depends=sources,
              extra_compile_args=[*levels.COMMON, *flags, *extra], extra_link_args=link)
    for level, flags in levels.levels().items()
]
if __name__ == "__main__":
    from Cython.Build import cythonize

    setup(ext_modules=cythonize(extensions, nthreads=0))
