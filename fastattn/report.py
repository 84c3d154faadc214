"""show_config: what a bug report needs.

It works without CUDA packages, without a driver and without the compiled CPU engine.
"""
from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

_PACKAGES = ("numpy", "ml_dtypes", "torch", "jax", "cupy-cuda13x", "cupy-cuda12x")
_COMPILERS = ("numba", "numba-cuda", "llvmlite", "cuda-bindings", "cuda-core", "nvidia-nvvm", "nvidia-nvjitlink", "nvidia-cuda-nvcc-cu12",
              "nvidia-nvjitlink-cu12")          # the last two: numba-cuda[cu12] finds NVVM and nvJitLink there


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
    from . import __version__, registry

    config = {"fastattn": __version__, "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    config |= _versions(_PACKAGES)
    try:
        from . import cpu

        config["cpu engine"] = f"{cpu.instruction_set()}, {cpu.get_num_threads()} threads"
    except ImportError as error:
        config["cpu engine"] = f"not built ({error})"
    config |= _versions(_COMPILERS)
    config |= _cuda()
    config["engines"] = registry.report()
    width = max(map(len, config))
    for name, value in config.items():
        print(f"{name:{width}} {value}")
    return config


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    """The versions of installed packages, from their metadata: nothing is imported."""
    from importlib import metadata  # here: it costs more than the rest of the package's import

    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cuda() -> dict[str, str]:
    """Driver, devices, engine and cache folder. Where the driver cannot be called: its /proc files, and the reason."""
    from .arrays import streams

    config = {"cuda driver": _proc_driver() or "none", "cuda devices": ", ".join(_proc_devices()) or "none"}
    try:
        d = streams.driver()
        number = streams.check(d.cuDriverGetVersion(), "cuDriverGetVersion")
        config["cuda driver"] = f"{_proc_driver() or 'NVIDIA driver'}, CUDA {number // 1000}.{number % 1000 // 10}"
        count = streams.check(d.cuDeviceGetCount(), "cuDeviceGetCount")
        config["cuda devices"] = ", ".join(_device(d, n) for n in range(count)) or "none"
    except (ImportError, RuntimeError) as error:
        config["cuda driver"] += f" ({error})"
    try:
        from .gpu.runtime import cache

        config["gpu engine"] = "numba-cuda"
        config["cache folder"] = cache.described()
    except (ImportError, RuntimeError, AttributeError) as error:    # numba-cuda fails so where NumPy is too new for it
        config["gpu engine"] = f"not available ({error}); pip install 'fastattn[gpu]' brings its packages"
    return config


def _device(d: Any, n: int) -> str:
    from .arrays import streams

    handle = streams.check(d.cuDeviceGet(n), "cuDeviceGet")
    name = streams.check(d.cuDeviceGetName(100, handle), "cuDeviceGetName").split(b"\0")[0].decode()
    kinds = d.CUdevice_attribute
    major, minor = (streams.check(d.cuDeviceGetAttribute(kind, handle), "cuDeviceGetAttribute") for kind in (
        kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR))
    return f"{n}: {name} (sm_{major}{minor})"


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
