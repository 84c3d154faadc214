"""Every PTX intrinsic and every function on fragments alone: its instructions
in the compiled code, and with a GPU its results.

The probes are in tests/tools/gpu/probes*.py. A public name of gpu/ptx, gpu/tile/fragments or gpu/tile/stores without one fails.
"""
from __future__ import annotations

import importlib
import inspect
import multiprocessing
import os
import pkgutil
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest

from tests.tools.devices import requires_gpu

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")


from fastattn.arrays.view import View, contiguous
from fastattn.gpu import ptx
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.tile import bits, fragments, stores
from tests.tools.gpu import (  # noqa: F401  which add their probes to PROBES
    interpreter_tiles,
    probes_8bit,
    probes_backward,
    probes_bias,
    probes_columns,
    probes_direct,
    probes_direct_8bit,
    probes_float,
    probes_fragments,
    probes_mma,
    probes_parts,
    probes_scalar,
    probes_tiles,
    probes_traced,
    probes_widened,
)
from tests.tools.gpu.interpreter_arithmetic import require_known
from tests.tools.gpu.probes import PROBES, Array

NAMES = list(PROBES)
# how inline assembly is written and packed; every probe goes through it
PLUMBING = {"fragments.I1", "fragments.PAIR", "fragments.row_of", "fragments.col_of"}


def _public(module: Any) -> Iterator[str]:
    """Intrinsics and functions that a module defines itself. Intrinsics do not know their module, so imported names are
    recognised by the
    module's own text."""
    text = inspect.getsource(module)
    for name, x in vars(module).items():
        own = re.search(rf"^(def {name}\(|{name}\b.* = )|^\w+, {name} = ", text, re.MULTILINE)
        if own and callable(x) and not isinstance(x, type) and not name.startswith("_"):
            yield name


def public_names() -> set[str]:
    files = [info.name for info in pkgutil.iter_modules(ptx.__path__) if info.name != "asm"]
    modules = [importlib.import_module(f"fastattn.gpu.ptx.{name}") for name in files]
    return {f"{m.__name__.rpartition('.')[2]}.{name}" for m in (*modules, bits, fragments, stores) for name in _public(m)} - PLUMBING


def test_every_public_name_has_a_probe() -> None:
    covered = {name for probe in PROBES.values() for name in probe.covers}
    names = public_names()
    assert {"arith.exp2", "sync.uniform", "wgmma.qk", "fragments.row_max"} - names == {"wgmma.qk"}
    assert not names - covered, f"without a probe in tests/tools/gpu/probes*.py: {sorted(names - covered)}"
    assert not covered - names, f"probes of what is no more: {sorted(covered - names)}"


# ---------------------------------------------------------------- without a GPU: the text
def ptx_of(name: str) -> str:
    code, _report = compiler.build(PROBES[name].source(name), "sm_90a", output="ptx")
    return code.decode()


@pytest.fixture(scope="session")
def texts(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    chosen = [item.callspec.params["name"] for item in request.session.items if "texts" in getattr(item, "fixturenames", ())]
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), len(chosen)), multiprocessing.get_context("spawn")) as pool:
        yield {name: pool.submit(ptx_of, name) for name in chosen}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", NAMES)
def test_text(name: str, texts: dict[str, Any]) -> None:
    text = texts[name].result()
    for instruction in PROBES[name].text:
        assert instruction in text, f"no {instruction!r} in\n{text}"


# ---------------------------------------------------------------- without a GPU: the numbers of those that run from their PTX
def run_text(name: str, src: Array, other: Array, dst: Array, n: int) -> Array:
    """`run` in the interpreter."""
    memory = interpreter_tiles.Memory()
    places = [memory.place(x, View(x.ctypes.data, x.shape, contiguous(x.shape, x.itemsize), x.dtype.name)) for x in (src, other, dst)]
    interpreter_tiles.Launcher(memory).load(PROBES[name].source(name)).launch(1, [*(place.ptr for place in places), 0, 0, 0, n], 0)
    return memory.read(places[2], dst.dtype)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("direct", "wgmma_float.load"))])
def test_numbers_from_the_text(name: str) -> None:
    PROBES[name].check(lambda *args, **kwargs: run_text(name, *args, **kwargs))


@pytest.mark.parametrize("name", ["fma.rz.f32", "add.rm.f32", "cvt.rn.satfinite.bf16x2.f32", "min.xorsign.abs.f32"])
def test_what_the_interpreter_does_not_compute_is_refused(name: str) -> None:
    with pytest.raises(AssertionError, match=f"does not know .* of {name}"):
        require_known(name)


# ---------------------------------------------------------------- with a GPU: the numbers
def run(name: str, src: Array | None = None, other: Array | None = None, dst: Array | None = None, n: int = 0,
        maps: list[tuple[str, int]] | None = None) -> Array:
    """dst after the probe's kernel ran. `maps`: (array, rows of a box) for map_a, map_b and map_c."""
    from cuda.bindings import driver

    from fastattn.gpu.runtime.device import check, current, device
    from fastattn.gpu.runtime.tensormap import row_map, tensor_maps

    source, arrays = PROBES[name].source(name), {"src": src, "other": other, "dst": dst}
    with current(device(0)):
        places = {}
        for which, x in arrays.items():
            places[which] = 0 if x is None else int(check(driver.cuMemAlloc(max(x.nbytes, 1)), "cuMemAlloc"))
            if x is not None:
                arrays[which] = x = np.ascontiguousarray(x)
                check(driver.cuMemcpyHtoD(places[which], x.ctypes.data, x.nbytes), "cuMemcpyHtoD")
        addresses = [0, 0, 0]
        for k, (which, rows) in enumerate(maps or []):
            x = arrays[which]
            assert x is not None
            place = View(places[which], x.shape, contiguous(x.shape, x.itemsize), x.dtype.name, ("cuda", 0))
            if x.dtype == np.float32:
                addresses[k] = row_map(place.ptr, x.shape[1], x.strides[0], rows, 0, False)
            else:
                [addresses[k]] = tensor_maps(((place, rows),), False)
        compiler.Kernel(source, 0).launch(1, [*places.values(), *addresses, n], 1)
        assert dst is not None
        result = np.empty_like(dst)
        check(driver.cuMemcpyDtoH(result.ctypes.data, places["dst"], result.nbytes), "cuMemcpyDtoH")
        for place in places.values():
            if place:
                check(driver.cuMemFree(place), "cuMemFree")
    return result


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_numbers(name: str) -> None:
    from fastattn.gpu.runtime.device import device

    hopper = name.split(".")[0] in ("tma", "wgmma", "wgmma_8bit", "mbarrier", "matrix", "direct cluster")
    hopper = hopper or name in ("sync.barrier_arrive", "sync.wait_for_previous")
    if hopper and device(0).arch != "sm_90a":
        pytest.skip(f"needs sm_90a, this is {device(0).arch}")
    PROBES[name].check(lambda *args, **kwargs: run(name, *args, **kwargs))
