"""NVRTC and the CUDA driver through ctypes: compile a .cu source of this package once, load it, launch it.

torch's CUDA builds bring both libraries, so nothing has to be installed and no CUDA toolkit is needed. A compiled
kernel is found again by the hash of its source, of every header that it includes, settings, architecture and compiler
version; it is written to a temporary name, then renamed, so that processes may compile at once. Threads of one process
take turns (`once`).
"""

from __future__ import annotations

import ctypes
import functools
import glob
import hashlib
import os
import re
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from kbit.kernels.cache import cache_folder

FOLDER = Path(__file__).parent
_INCLUDE = re.compile(r'^#include "([\w.]+)"', re.MULTILINE)
_T = TypeVar("_T")
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


def _nvrtc_candidates() -> list[str]:
    major = (torch.version.cuda or "12").split(".")[0]
    name = f"libnvrtc.so.{major}"
    found: list[str] = []
    for root in (sysconfig.get_paths()["purelib"], str(Path(torch.__file__).parents[1])):
        found += glob.glob(f"{root}/nvidia/*/lib/{name}*") + glob.glob(f"{root}/torch/lib/libnvrtc*.so*")
    for toolkit in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if toolkit:
            found += glob.glob(f"{toolkit}/lib64/{name}*")
    found = [path for path in found if "builtins" not in path and ".alt." not in path]
    return [*dict.fromkeys(found), name]


@functools.cache
def nvrtc() -> ctypes.CDLL:
    """The run-time compiler. Raises OSError where none can be loaded."""
    for path in _nvrtc_candidates():
        try:
            # NVRTC looks its builtins up by name alone: loaded beforehand, they are found wherever they lie.
            for builtins in glob.glob(str(Path(path).parent / "libnvrtc-builtins.so.*")) if "/" in path else ():
                if ".alt." not in builtins:
                    ctypes.CDLL(builtins)
            library = ctypes.CDLL(path)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise OSError("NVRTC (libnvrtc) was not found; it comes with torch's CUDA builds and with the CUDA toolkit")


@functools.cache
def driver() -> ctypes.CDLL:
    """The CUDA driver. Raises OSError where there is none."""
    return ctypes.CDLL("libcuda.so.1")


def check(status: int, what: str) -> None:
    """RuntimeError with the driver's own words where a driver call failed."""
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what} failed: {(text.value or b'unknown error').decode()} ({status})")


def once(function: Callable[..., _T]) -> Callable[..., _T]:
    """The function with its results remembered; of threads that ask for one at the same time, the first makes it."""
    remembered = functools.lru_cache(maxsize=1024)(function)
    lock = threading.Lock()

    @functools.wraps(function)
    def wrapper(*args: Any) -> _T:
        with lock:
            return remembered(*args)  # type: ignore[arg-type]

    return wrapper


def with_headers(source: str, given: Mapping[str, str]) -> dict[str, str]:
    """The headers in `given`, and those of this folder that a source includes by name, directly or through others."""
    found = dict(given)
    texts = [source, *given.values()]
    while texts:
        for name in _INCLUDE.findall(texts.pop()):
            if name not in found:
                found[name] = (FOLDER / name).read_text()
                texts.append(found[name])
    return found


def compile_cubin(
    source: str, name: str, arch: str, settings: Mapping[str, object], headers: Mapping[str, str]
) -> bytes:
    """Machine code of a source for `arch` ("sm_90a"). Raises RuntimeError with the compiler's log."""
    library = nvrtc()
    program = ctypes.c_void_p()
    contents = (ctypes.c_char_p * len(headers))(*[text.encode() for text in headers.values()])
    names = (ctypes.c_char_p * len(headers))(*[key.encode() for key in headers])
    status = library.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), f"{name}.cu".encode(), len(headers), contents, names
    )
    if status:
        raise RuntimeError(f"NVRTC could not take {name}: {library.nvrtcGetErrorString(status).decode()}")
    try:
        options = [
            f"--gpu-architecture={arch}",
            "--std=c++17",
            "-default-device",
            *(f"-D{key}={value}" for key, value in settings.items()),
        ]
        encoded = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        if library.nvrtcCompileProgram(program, len(options), encoded):
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC could not compile {name} for {arch}:\n{log.value.decode()}")
        size = ctypes.c_size_t()
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def cubin(name: str, arch: str, settings: Mapping[str, object], headers: Mapping[str, str]) -> bytes:
    """`compile_cubin` of `<name>.cu` in this folder, through the cache on disk. headers: those made for these settings;
    headers in this folder are found by themselves."""
    source = (FOLDER / f"{name}.cu").read_text()
    headers = with_headers(source, headers)
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    identity = repr((source, sorted(settings.items()), sorted(headers.items()), arch, major.value, minor.value))
    path = cache_folder() / "cuda" / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    code = compile_cubin(source, name, arch, settings, headers)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    except OSError:
        pass  # a read-only home costs a compilation in the next process, nothing else
    return code


def make_context_current() -> None:
    """Have this thread use the context that torch uses on its current device (the driver's "primary" one)."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    check(driver().cuDeviceGet(ctypes.byref(device), torch.cuda.current_device()), "finding the GPU")
    check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "finding the GPU's context")
    check(driver().cuCtxSetCurrent(context), "using the GPU's context")


def load(code: bytes, name: str, shared_bytes: int) -> ctypes.c_void_p:
    """The kernel `name` of machine code, loaded on the current device. Allowed while a CUDA graph is captured."""
    context = ctypes.c_void_p()
    check(driver().cuCtxGetCurrent(ctypes.byref(context)), f"loading {name}")
    if not context:
        make_context_current()
    mode = ctypes.c_int(_RELAXED)
    check(driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "preparing to load a kernel")
    try:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        check(driver().cuModuleLoadData(ctypes.byref(module), code), f"loading {name}")
        check(driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"loading {name}")
        check(driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared_bytes), f"reserving memory for {name}")
        return function
    finally:
        driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = [("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Launch(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    ]


# The kernel may start while the one before it on the stream still runs; it waits for that one itself before it reads
# or writes anything (griddepcontrol.wait), so only its preparations overlap.
_OVERLAP = _Attribute(id=6, value=1)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class Launcher:
    """A loaded kernel with its grid shape, ready to start again and again.

    Arguments live in one block of memory that every call fills anew, under a lock: a launch copies them, so the next
    call may overwrite them. This keeps a call's cost on the CPU near that of the driver itself.
    """

    def __init__(
        self,
        function: ctypes.c_void_p,
        arguments: type[ctypes.Structure],
        threads: int,
        shared: int,
        overlap: bool = True,
    ) -> None:
        """overlap: whether the kernel waits by griddepcontrol, as compute capability 9.0 and later can."""
        raw = ctypes.create_string_buffer(ctypes.sizeof(arguments) + 64)
        self._keep = raw
        self.values: Any = arguments.from_buffer(raw, -ctypes.addressof(raw) % 64)
        start = ctypes.addressof(self.values)
        fields = [getattr(arguments, field[0]) for field in arguments._fields_]
        self.memory = (ctypes.c_char * ctypes.sizeof(arguments)).from_address(start)  # of `values`, to pack into
        # Where the driver finds each argument: in `values`, unless a caller who keeps one elsewhere says so.
        self.pointers = (ctypes.c_void_p * len(fields))(*[start + field.offset for field in fields])
        self._grid = (1, 1, 1)
        self._config = _Launch((1, 1, 1), (threads, 1, 1), shared, None, ctypes.addressof(_OVERLAP), int(overlap))
        self._reference = ctypes.byref(self._config)
        self._function = function
        self._start = driver().cuLaunchKernelEx
        self._start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self.lock = threading.Lock()

    def start(self, grid: tuple[int, int, int], stream: int) -> None:
        """Launch with what `values` holds; hold `lock` from filling it to the end of this call."""
        if grid != self._grid:
            self._config.grid[:] = self._grid = grid
        self._config.stream = stream
        status = self._start(self._reference, self._function, self.pointers, None)
        if status == _INVALID_CONTEXT:  # a thread in which torch has not used the GPU yet
            make_context_current()
            status = self._start(self._reference, self._function, self.pointers, None)
        if status:
            check(status, "launching a kernel")
