"""Fixtures of the GPU tests."""
from __future__ import annotations

import pytest

from tests.tools.devices import device_count


@pytest.fixture(scope="session")
def kernels(request: pytest.FixtureRequest) -> None:
    """The kernels of all selected tests, compiled before the first test that needs one, in as many processes as there are processors."""
    if device_count():
        from tests.tools.gpu.cases import compile_kernels  # here: it skips a module where the GPU engine's packages are not installed

        compile_kernels(request.session.items)
