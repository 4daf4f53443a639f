"""Keep freed memory in the process: on a CPU each training step allocates and frees the same gigabyte of activations.

glibc gives large freed blocks back to the kernel, and the next step pays a page fault and a cleared page for every 4 KiB:
a sixth of a step of SmolLM2-135M was spent in the kernel. Told to keep them, the process holds what its largest step
needed (as PyTorch's own allocator does on a GPU), and the kernel's part goes to zero.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks up to 1 GiB for the next allocation, process-wide; False where there is no glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 1 << 30) and mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1))
