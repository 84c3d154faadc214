"""show_config: what a bug report needs, gathered without importing anything heavy."""
from __future__ import annotations

import os
import platform
from pathlib import Path

_PACKAGES = ("numpy", "ml_dtypes", "numba", "numba-cuda", "cuda-core", "torch", "jax")


def show_config() -> dict[str, str]:
    """Print and return versions, the CPU instruction set in use, threads, CUDA devices and the cache folder."""
    from importlib import metadata  # here: it costs more than the rest of the package's import

    from . import __version__

    config = {"fastattn": __version__, "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        try:
            config[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    try:
        from . import cpu

        config["cpu engine"] = f"{cpu.instruction_set()}, {cpu.get_num_threads()} threads"
    except ImportError as error:
        config["cpu engine"] = f"not built ({error})"
    config["cuda devices"] = ", ".join(_cuda_devices()) or "none"
    config["cache folder"] = str(cache_folder())
    for name, value in config.items():
        print(f"{name:14} {value}")
    return config


def _cuda_devices() -> list[str]:
    """Names of the NVIDIA devices from the driver's /proc files, so that no CUDA package is needed."""
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        names += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
    return names


def cache_folder() -> Path:
    """Where compiled kernels are kept: $FASTATTN_CACHE, else $XDG_CACHE_HOME/fastattn, else ~/.cache/fastattn."""
    own = os.environ.get("FASTATTN_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastattn"
