"""What a GPU draws and how fast its SMs run while a benchmark does: counters of the driver's management library."""

from __future__ import annotations

import ctypes
import threading
import time
from types import TracebackType

import torch

_PERIOD = 0.02  # seconds between readings
_SM_CLOCK = 1  # NVML_CLOCK_SM
_POWER_CAP = 4  # nvmlClocksEventReasonSwPowerCap


class Counters:
    """Reads the current GPU's counters for as long as its `with` block runs.

    Attributes are set when the block ends, and None where the driver does not tell:
        watts: mean power, from the energy that the driver counts.
        sm_mhz: mean clock of the SMs.
        power_capped: share of the readings in which the power limit held the clock down.
    """

    def __init__(self) -> None:
        self.watts: float | None = None
        self.sm_mhz: float | None = None
        self.power_capped: float | None = None
        self._readings: list[tuple[float, int, int, int]] = []  # seconds, millijoules, MHz, reasons to clock down
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Counters:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if not self._readings:
            return
        # The energy is counted several times a second; only from count to count does its time fit.
        counts = [new for old, new in zip(self._readings, self._readings[1:], strict=False) if new[1] != old[1]]
        if len(counts) > 1:
            self.watts = 1e-3 * (counts[-1][1] - counts[0][1]) / (counts[-1][0] - counts[0][0])
        num_readings = len(self._readings)
        self.sm_mhz = sum(clock for _, _, clock, _ in self._readings) / num_readings
        self.power_capped = sum(bool(reasons & _POWER_CAP) for *_, reasons in self._readings) / num_readings

    def _run(self) -> None:
        try:
            gpu = _Gpu(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
            while not self._stop.wait(_PERIOD):
                self._readings.append((time.perf_counter(), *gpu.read()))
        except (OSError, AttributeError):  # no such library, function or counter: some virtual machines have none
            self._readings.clear()


class _Gpu:
    """A GPU as NVML knows it."""

    def __init__(self, uuid: object) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._handle = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByUUID", f"GPU-{uuid}".encode(), ctypes.byref(self._handle))

    def read(self) -> tuple[int, int, int]:
        """Millijoules since the driver was loaded, MHz of the SMs, and why they are not faster, in bits."""
        energy, clock, reasons = ctypes.c_ulonglong(), ctypes.c_uint(), ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._handle, ctypes.byref(energy))
        self._call("nvmlDeviceGetClockInfo", self._handle, _SM_CLOCK, ctypes.byref(clock))
        self._call("nvmlDeviceGetCurrentClocksThrottleReasons", self._handle, ctypes.byref(reasons))
        return energy.value, clock.value, reasons.value

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise OSError(code, f"{name} failed")
