"""How the heavy libraries behave in a command: quiet, with few threads. Call `prepare` before they are imported."""

from __future__ import annotations

import os
import warnings


def prepare() -> None:
    """Quiet TensorFlow's C++ logs and a warning TFF's imports cause; one BLAS thread.

    Settings of the operator's own environment win. Two OpenBLAS threads made the rules' matrix products up to 48 times
    slower than one on two busy cores; agents and the broker want those cores too.
    """
    for name, value in (("TF_CPP_MIN_LOG_LEVEL", "3"), ("OMP_NUM_THREADS", "1"), ("OPENBLAS_NUM_THREADS", "1")):
        os.environ.setdefault(name, value)
    # googleapis-common-protos, which TFF imports, still uses pkg_resources
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated", category=UserWarning)
