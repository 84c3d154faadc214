"""What a bug report needs: as nested data, which `python -m fastattn --json` prints, and as lines, by show_config.

It works without CUDA packages, without a driver and without the compiled CPU engine.
"""
from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

_PACKAGES = ("numpy", "ml_dtypes", "torch", "jax", "cupy-cuda13x", "cupy-cuda12x")
_COMPILERS = ("numba", "numba-cuda", "llvmlite", "cuda-bindings", "cuda-core", "nvidia-nvvm", "nvidia-nvjitlink", "nvidia-cuda-nvcc-cu12",
              "nvidia-nvjitlink-cu12")          # the last two: numba-cuda[cu12] finds NVVM and nvJitLink there
SETTINGS = "FASTATTN_"                          # variables of the environment that begin so are reported


def show_config() -> dict[str, str]:
    """Print what a bug report needs.

    Returns
    -------
    dict of str to str
        What was printed: versions of Python and of the packages found, CPU instruction set and threads, CUDA driver and
        devices, the folder of the kernel cache, engines. A part that is missing is reported with the reason.

    Examples
    --------
    >>> import fastattn
    >>> config = fastattn.show_config()         # doctest: +ELLIPSIS
    fastattn ...
    >>> config["fastattn"] == fastattn.__version__
    True
    """
    config = _lines(facts())
    width = max(map(len, config))
    for name, value in config.items():
        print(f"{name:{width}} {value}")
    return config


def facts() -> dict[str, Any]:
    """The same as data for programs. Every key is always there; docs/command-line.md lists them."""
    from . import registry
    from .version import __version__

    found = registry.engines()
    return {
        "fastattn": __version__,
        "python": {"version": platform.python_version(), "system": platform.system(), "machine": platform.machine()},
        "packages": _versions((*_PACKAGES, *_COMPILERS)),
        "cpu_engine": cpu_engine_facts(),
        "cuda": cuda_facts(),
        "gpu_engine": gpu_engine_facts(),
        "engines": [{"name": engine.name, "device": engine.device, "built_in": engine.built_in} for engine in found],
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)},
    }


def _lines(found: dict[str, Any]) -> dict[str, str]:
    """The facts in words, a line each. Packages that are missing have none."""
    from . import registry

    python, cpu, cuda, gpu = found["python"], found["cpu_engine"], found["cuda"], found["gpu_engine"]
    versions = {name: version for name, version in found["packages"].items() if version is not None}
    lines = {"fastattn": found["fastattn"], "python": f"{python['version']} on {python['system']} {python['machine']}"}
    lines |= {name: version for name, version in versions.items() if name in _PACKAGES}
    lines["cpu engine"] = f"not built ({cpu['error']})" if cpu["error"] else f"{cpu['instruction_set']}, {cpu['threads']} threads"
    lines |= {name: version for name, version in versions.items() if name in _COMPILERS}
    driver = cuda["driver"] or ("none" if cuda["version"] is None else "NVIDIA driver")
    lines["cuda driver"] = driver + (f", CUDA {cuda['version']}" if cuda["version"] else f" ({cuda['error']})")
    lines["cuda devices"] = ", ".join(f"{d['ordinal']}: {d['name']}" + (f" ({d['arch']})" if d["arch"] else "")
                                      for d in cuda["devices"]) or "none"
    lines |= _gpu_lines(gpu) | {"engines": registry.report()}
    return {**lines, **found["environment"]}


def _gpu_lines(gpu: dict[str, Any]) -> dict[str, str]:
    if gpu["error"]:
        return {"gpu engine": f"not available ({gpu['error']}); pip install 'fastattn[gpu]' brings its packages"}
    from .gpu.runtime import cache

    return {"gpu engine": "numba-cuda", "cache folder": cache.described()}


def _versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    """The versions of packages, None if not installed, from their metadata: nothing is imported."""
    from importlib import metadata  # here: it costs more than the rest of the package's import

    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def cpu_engine_facts() -> dict[str, Any]:
    try:
        from . import cpu
    except (ImportError, ValueError) as error:      # not built; FASTATTN_ISA names a level that this CPU lacks
        return {"instruction_set": None, "threads": None, "error": str(error)}
    return {"instruction_set": cpu.instruction_set(), "threads": cpu.get_num_threads(), "error": None}


def cuda_facts() -> dict[str, Any]:
    """Driver, CUDA version and devices. Where the driver cannot be called: what its /proc files say, and the reason."""
    from .arrays import streams

    found: dict[str, Any] = {"driver": _proc_driver() or None, "version": None, "error": None,
                             "devices": [{"ordinal": n, "name": name, "arch": None} for n, name in enumerate(_proc_devices())]}
    try:
        d = streams.driver()
        number = streams.check(d.cuDriverGetVersion(), "cuDriverGetVersion")
        count = streams.check(d.cuDeviceGetCount(), "cuDeviceGetCount")
        found["devices"] = [_device(d, n) for n in range(count)]
        found["version"] = f"{number // 1000}.{number % 1000 // 10}"
    except (ImportError, RuntimeError) as error:
        found["error"] = _short(error)
    return found


def _short(error: Exception) -> str:
    """Why there is no CUDA, in a few words: the packages' own texts have 200 characters."""
    if isinstance(error, ImportError):
        return "the package cuda-bindings is not installed"
    if error.__cause__ is not None:
        return "libcuda.so.1, the NVIDIA driver's library, cannot be loaded"
    return str(error).removeprefix("CUDA arrays need the NVIDIA driver, whose ").rstrip(".")


def gpu_engine_facts() -> dict[str, Any]:
    try:
        from .gpu.runtime import cache

        return {"error": None, "cache_folders": [{"path": str(path), "error": cache.refusal(path)} for path in cache.folders()]}
    except (ImportError, RuntimeError, AttributeError) as error:    # numba-cuda fails so where NumPy is too new for it
        return {"error": str(error), "cache_folders": []}


def _device(d: Any, n: int) -> dict[str, Any]:
    from .arrays import streams

    handle = streams.check(d.cuDeviceGet(n), "cuDeviceGet")
    name = streams.check(d.cuDeviceGetName(100, handle), "cuDeviceGetName").split(b"\0")[0].decode()
    kinds = d.CUdevice_attribute
    major, minor = (streams.check(d.cuDeviceGetAttribute(kind, handle), "cuDeviceGetAttribute") for kind in (
        kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR))
    return {"ordinal": n, "name": name, "arch": f"sm_{major}{minor}"}


def _proc_driver() -> str:
    """The kernel driver's version, e.g. 580.95.05."""
    try:
        found = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def _proc_devices() -> list[str]:
    """Names of the NVIDIA devices from the driver's /proc files, so that no CUDA package is needed."""
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        names += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
    return names
