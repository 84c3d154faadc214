"""Builds the CPU engine: every file of fastattn/cpu/isa is the same Cython source, compiled for one instruction set.

Environment: FASTATTN_LEVELS="x86_64_v3 x86_64_v4" builds only these levels; FASTATTN_SYMBOLS=1 keeps symbols for a profiler;
FASTATTN_SANITIZE=address,undefined builds with these sanitizers (tests/sanitize.sh).
"""
import importlib.util
import os
import pathlib

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

here = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("levels", here / "fastattn" / "cpu" / "levels.py")
levels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(levels)

flags = levels.levels()
wanted = os.environ.get("FASTATTN_LEVELS", "").replace(",", " ").split() or list(flags)
if not set(wanted) <= set(flags):
    raise SystemExit(f"FASTATTN_LEVELS is {' '.join(wanted)!r}; expected some of: {' '.join(flags)}.")

sanitize = os.environ.get("FASTATTN_SANITIZE")
extra = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"] if sanitize else ["-g0"]
strip = [] if os.environ.get("FASTATTN_SYMBOLS") else ["-s"]
link = ["-fopenmp", *([f"-fsanitize={sanitize}"] if sanitize else strip)]
sources = [str(p.relative_to(here)) for p in sorted((here / "fastattn" / "cpu").iterdir()) if p.suffix in (".h", ".pxi")]

extensions = [
    Extension(f"fastattn.cpu.isa.{level}", [f"fastattn/cpu/isa/{level}.pyx"], include_dirs=["fastattn/cpu"], depends=sources,
              extra_compile_args=[*levels.COMMON, *flags[level], *extra], extra_link_args=link)
    for level in wanted
]


class build(build_ext):
    """Cython for all levels first, one after another (it is not thread-safe), then the compiler for several at once."""

    def build_extensions(self):
        from Cython.Build import cythonize

        for ours, new in zip(self.extensions, cythonize(extensions), strict=True):
            ours.sources = new.sources
        super().build_extensions()


if __name__ == "__main__":
    setup(ext_modules=extensions, cmdclass={"build_ext": build}, options={"build_ext": {"parallel": True}})
