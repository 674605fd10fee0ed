"""An import of lcm prepares the process of a program, a worker or a pool."""

import subprocess
import sys


def test_bitsandbytes_asks_for_no_kernels() -> None:
    code = "import lcm, logging; logging.getLogger('bitsandbytes.backends.cpu.ops').warning('Failed to load gemm_4bit_forward')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
