"""Builds the CPU engine: every file of fastattn/cpu/isa is the same Cython source, compiled for one instruction set.

Environment: FASTATTN_LEVELS="x86_64_v3 x86_64_v4" builds only these levels; FASTATTN_SYMBOLS=1 keeps symbols for a profiler;
FASTATTN_SANITIZE=address,undefined builds with these sanitizers (tests/sanitize.sh). CC names the compiler, gcc or clang.

It also makes the page of the package index out of README.md: links relative to the repository become absolute.
"""
import importlib.util
import os
import pathlib
import re
import sys
import tempfile
import tomllib
import warnings

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

here = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("levels", here / "fastattn" / "cpu" / "levels.py")
levels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(levels)

NEEDED = "fastattn's CPU engine needs gcc or clang, and a 64-bit system"
STRIP = ["-Wl,-x"] if sys.platform == "darwin" else ["-s"]


# ---------------------------------------------------------------- README
def absolute_links(text, base, revision):
    """Markdown whose relative links lead into `revision` of the repository at `base`. Code, anchors and addresses stay as they are."""
    def absolute(found, before, target, after):
        if found[1] or re.match(r"#|[a-z][a-z0-9+.-]*:", found[target], re.IGNORECASE):
            return found[0]
        kind = "raw" if found[before][0] in "!<" else "blob"
        return f"{found[before]}{base}/{kind}/{revision}/{found[target].removeprefix('./')}{found[after]}"

    code = r"(^```.*?^```|`[^`\n]*`)"
    picture = r"(!\[[^\[\]]*\]\()([^)\s]+)([^)]*\))"
    tag = r"(<(?:img|source)\s[^>]*?src(?:set)?=\")([^\"\s]+)(\")"
    link = r"((?<!!)\[(?:[^\[\]]|!\[[^\[\]]*\]\([^)]*\))*\]\()([^)\s]+)([^)]*\))"      # its text may be a picture
    for pattern in (picture, tag, link):
        text = re.sub(f"{code}|{pattern}", lambda found: absolute(found, 2, 3, 4), text, flags=re.MULTILINE | re.DOTALL)
    return text


def long_description():
    project = tomllib.loads((here / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = re.search(r'^__version__ = "(.+)"$', (here / "fastattn" / "version.py").read_text(encoding="utf-8"), re.MULTILINE)[1]
    return absolute_links((here / "README.md").read_text(encoding="utf-8"), project["urls"]["Source"], f"v{version}")


# ---------------------------------------------------------------- extensions
def wanted_levels():
    """Levels of FASTATTN_LEVELS, or all of this architecture."""
    known = list(levels.levels())
    wanted = os.environ.get("FASTATTN_LEVELS", "").replace(",", " ").split() or known
    if not set(wanted) <= set(known):
        raise SystemExit(f"FASTATTN_LEVELS is {' '.join(wanted)!r}; expected some of: {' '.join(known)}.")
    return wanted


def extensions():
    """The module that says what the CPU can run, and one module a level."""
    sanitize = os.environ.get("FASTATTN_SANITIZE")           # -g1: the lines of a report; following variables takes 20 s of gcc a level
    extra = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1", "-O1"] if sanitize else ["-g0"]
    link = [f"-fsanitize={sanitize}"] if sanitize else [] if os.environ.get("FASTATTN_SYMBOLS") else STRIP
    flags = levels.levels()
    sources = [str(p.relative_to(here)) for p in sorted((here / "fastattn" / "cpu").iterdir()) if p.suffix in (".h", ".pxi")]

    def extension(name, flags, link):
        return Extension(f"fastattn.cpu.{name}", [f"fastattn/cpu/{name.replace('.', '/')}.pyx"], include_dirs=["fastattn/cpu"],
                         depends=sources, extra_compile_args=[*levels.COMMON, *flags, *extra], extra_link_args=link)

    return [extension("detect", flags["baseline"], link),
            *(extension(f"isa.{level}", ["-pthread", *flags[level]], ["-pthread", *link]) for level in wanted_levels())]


class build(build_ext):
    """Cython for all modules first, in processes (it is not thread-safe), then the compiler for several at once."""

    def build_extensions(self):
        from Cython.Build import cythonize

        self._leave_out_refused()
        # here, as an editable installation forgets the options of setup(). One more than cores (400 MB each): behind pairs of equal
        # levels on two cores the fifth would be alone
        self.parallel = self.parallel or (os.cpu_count() or 1) + 1
        processes = min(os.cpu_count() or 1, len(self.extensions)) if sys.platform == "linux" else 0
        for ours, new in zip(self.extensions, cythonize(self.extensions, nthreads=processes), strict=True):
            ours.sources = new.sources
        super().build_extensions()

    def _leave_out_refused(self):
        """Levels whose flags the compiler does not know are left out. One that FASTATTN_LEVELS names, and the baseline, are an error."""
        if self.compiler.compiler_type != "unix":           # MSVC has no vector types; MinGW has no pthread_atfork
            raise SystemExit(f"{NEEDED}. Compilers of the kind {self.compiler.compiler_type!r} cannot build it; on Windows use WSL.")
        if sys.maxsize < 2**32:
            raise SystemExit(f"{NEEDED}. This Python is 32-bit.")
        named, compiler = "FASTATTN_LEVELS" in os.environ, self.compiler.compiler[0]
        refused = [extension for extension in self.extensions if not self._accepts(extension)]
        if any(named or extension.name.endswith(("baseline", "detect")) for extension in refused):
            names = ", ".join(extension.name for extension in refused)
            raise SystemExit(f"{NEEDED}. The compiler, {compiler}, refuses the flags of {names}.")
        for extension in refused:
            warnings.warn(f"{extension.name} is left out: the compiler, {compiler}, refuses its flags. With a newer one fastattn is "
                          "faster on CPUs that have them.", stacklevel=2)
            self.extensions.remove(extension)

    def _accepts(self, extension):
        """Whether the compiler takes the flags of an extension."""
        with tempfile.TemporaryDirectory() as folder:
            source = pathlib.Path(folder, "empty.c")
            source.write_text("int empty;\n")
            try:
                self.compiler.compile([str(source)], output_dir=folder, extra_postargs=extension.extra_compile_args)
            except CompileError:
                return False
        return True


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": build},
          long_description=long_description(), long_description_content_type="text/markdown")
