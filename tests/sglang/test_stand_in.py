"""What stands in for SGLang's kernels on a machine without a GPU."""

from __future__ import annotations

import pytest

from ..engines.drivers import DRIVER


@pytest.fixture(scope="module", autouse=True)
def loaded():
    DRIVER.prepare()


def test_it_refuses_what_it_has_not():
    import sgl_kernel

    with pytest.raises(NotImplementedError, match="sgl_kernel.no_such_kernel was called, but this is only a stand-in"):
        sgl_kernel.no_such_kernel(1)
