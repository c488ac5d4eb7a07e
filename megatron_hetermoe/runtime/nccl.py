"""Which NCCL this process has loaded: torch's own, or one that LD_PRELOAD has put before it."""

from __future__ import annotations

import ctypes
import os

import torch
import torch.distributed as dist

_LIBRARY = "libnccl.so.2"


class _Place(ctypes.Structure):
    """Dl_info, of dlfcn.h."""

    _fields_ = [("file", ctypes.c_char_p), ("base", ctypes.c_void_p), ("symbol", ctypes.c_char_p),
                ("address", ctypes.c_void_p)]


def loaded_nccl() -> tuple[tuple[int, ...], str]:
    """Its version, as (2, 30, 7), and the file that it came from; empty without NCCL, and where the file is torch's own.

    ``torch.cuda.nccl.version()`` is the version that torch was built with.
    """
    if not dist.is_nccl_available():
        return (), ""
    try:
        # torch is linked to it, so there is one. Of two, which LD_PRELOAD makes, this is the first one, which torch calls.
        library = ctypes.CDLL(_LIBRARY, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return torch.cuda.nccl.version()[:3], ""  # a torch that contains NCCL
    number, place = ctypes.c_int(), _Place()
    library.ncclGetVersion(ctypes.byref(number))
    ctypes.CDLL(None).dladdr(library.ncclGetVersion, ctypes.byref(place))
    return (number.value // 10_000, number.value // 100 % 100, number.value % 100), os.fsdecode(place.file or b"")
