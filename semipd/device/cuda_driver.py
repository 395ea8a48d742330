"""The CUDA driver behind partitions: groups of SMs, green contexts on them, and streams in those.

A device is split once, into groups that share no SM; a green context is made of any of these groups, so contexts of
different groups are disjoint. torch's own `GreenContext.create(num_sms=)` splits anew for every context and cannot
promise that, hence `cuda.bindings`, which is imported when a `CudaDriver` is made.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from semipd.errors import PartitionUnavailable

logger = logging.getLogger(__name__)

MIN_DRIVER_VERSION = 12050
"""Green contexts came with CUDA 12.4, streams made in them with 12.5."""

WORK_QUEUE_DRIVER_VERSION = 13010
"""From CUDA 13.1 on a green context can have work queues of its own."""

MAX_CONNECTIONS = 32
"""Work queues between host and device, the most that CUDA has; 8 by default."""


def raise_max_connections(cuda: Any = torch.cuda) -> None:
    """Have CUDA use all its work queues, so that no lane waits in a queue behind the other lane's work.

    CUDA reads the variable when it starts: afterwards, and over a value of the user's, this only warns of too few.
    """
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    if not cuda.is_initialized():
        os.environ.setdefault(name, str(MAX_CONNECTIONS))
    value = os.environ.get(name, "unset")
    if not value.isdigit() or int(value) < MAX_CONNECTIONS:
        logger.warning(
            "%s is %s, so prefill and decode may wait for each other in one work queue; set it to %d before CUDA is "
            "used in this process",
            name,
            value,
            MAX_CONNECTIONS,
        )


@dataclass(frozen=True, slots=True, eq=False)
class SmGroup:
    """SMs that a device was split into, as the driver describes them."""

    num_sms: int
    resource: Any


class CudaDriver:
    """Green contexts of one device. Safe from several threads; CUDA must have been started by torch."""

    def __init__(self, device_index: int, bindings: Any = None) -> None:
        """The driver, through `bindings`: a module like `cuda.bindings.driver`, which None imports.

        Raises:
            PartitionUnavailable: without bindings, or with a driver that has no green contexts on this device.
        """
        self._bindings = _import_bindings() if bindings is None else bindings
        version = self.call("cuDriverGetVersion")
        if version < MIN_DRIVER_VERSION:
            raise PartitionUnavailable(
                f"the NVIDIA driver supports CUDA {_version_text(version)}; partitions need "
                f"{_version_text(MIN_DRIVER_VERSION)} or later, so update the driver"
            )
        self._device = self.call("cuDeviceGet", device_index)
        self._sm_type = self._bindings.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        self._device_sms = self.call("cuDeviceGetDevResource", self._device, self._sm_type)
        self._work_queues = self._make_work_queues(version)

    @property
    def num_sms(self) -> int:
        """SMs of the device that can be split."""
        return int(self._device_sms.sm.smCount)

    def split(self, group_size: int) -> tuple[list[SmGroup], SmGroup | None]:
        """As many disjoint groups of `group_size` SMs as the device has, and what remains of it.

        A group may be larger than asked, and the remainder has no guarantees of fitting thread block clusters.
        """
        asked = self.num_sms // group_size
        if asked == 0:
            return [], SmGroup(self.num_sms, self._device_sms)
        resources, num_groups, rest = self.call("cuDevSmResourceSplitByCount", asked, self._device_sms, 0, group_size)
        groups = [SmGroup(int(resource.sm.smCount), resource) for resource in resources[:num_groups]]
        num_rest = int(rest.sm.smCount) if rest.type == self._sm_type else 0
        return groups, SmGroup(num_rest, rest) if num_rest else None

    def make_context(self, groups: Sequence[SmGroup]) -> GreenContext:
        """A green context on the SMs of `groups`; 1.2 ms and 6 MiB of device memory each on an H100.

        Raises:
            PartitionUnavailable: the driver refused, or granted another number of SMs.
        """
        resources = [group.resource for group in groups]
        num_sms = sum(group.num_sms for group in groups)
        if self._work_queues is not None:
            try:
                return self._make_context([*resources, self._work_queues], num_sms)
            except PartitionUnavailable as error:
                logger.debug("green contexts are made without work queues of their own: %s", error)
                self._work_queues = None
        return self._make_context(resources, num_sms)

    def call(self, function: str, *args: Any) -> Any:
        """What the driver's `function` returns beside its status.

        Raises:
            PartitionUnavailable: the status is an error, or this driver has no such function.
        """
        try:
            status, *results = getattr(self._bindings, function)(*args)
        except RuntimeError as error:
            raise PartitionUnavailable(f"{function} cannot be called: {error}") from error
        if status != self._bindings.CUresult.CUDA_SUCCESS:
            raise PartitionUnavailable(f"the CUDA driver refused {function} with {status.name}")
        return results[0] if len(results) == 1 else results

    def trim(self, device_bytes: int) -> None:
        """Have the driver give back memory that it keeps for CUDA graphs to come, on the current device.

        There is no call for that, but it does so before it refuses an allocation, and of all `device_bytes` it must. On
        an H100 that takes 7 ms, and of 158 MiB that 64 graphs had left it kept 10.
        """
        try:
            self.call("cuMemFree", self.call("cuMemAlloc", device_bytes))
        except PartitionUnavailable as error:
            logger.debug("the driver trimmed what it keeps: %s", error)

    def make_stream(self, context: Any, priority: int) -> int:
        """The handle of a new stream in a green context, given by its own; priorities beyond CUDA's are clamped."""
        # Non-blocking: the legacy default stream, which a user's torch code runs on, would order the lanes otherwise.
        flags = self._bindings.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(self.call("cuGreenCtxStreamCreate", context, flags, priority))

    def _make_context(self, resources: list[Any], num_sms: int) -> GreenContext:
        descriptor = self.call("cuDevResourceGenerateDesc", resources, len(resources))
        flags = self._bindings.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM  # the driver insists on it
        context = GreenContext(self, self.call("cuGreenCtxCreate", descriptor, self._device, flags))
        try:
            granted = self.call("cuGreenCtxGetDevResource", context.handle, self._sm_type).sm.smCount
            if granted != num_sms:
                raise PartitionUnavailable(f"a partition of {num_sms} SMs was to be made and the driver gave {granted}")
        except BaseException:
            context.close()
            raise
        return context

    def _make_work_queues(self, version: int) -> Any:
        """A resource that gives a context work queues of its own where CUDA can; None where it cannot."""
        name = "CU_DEV_RESOURCE_TYPE_WORKQUEUE_CONFIG"
        if version < WORK_QUEUE_DRIVER_VERSION or not hasattr(self._bindings.CUdevResourceType, name):
            return None
        try:
            queues = self.call("cuDeviceGetDevResource", self._device, getattr(self._bindings.CUdevResourceType, name))
        except PartitionUnavailable as error:
            logger.debug("green contexts are made without work queues of their own: %s", error)
            return None
        scope = self._bindings.CUdevWorkqueueConfigScope.CU_WORKQUEUE_SCOPE_GREEN_CTX_BALANCED
        queues.wqConfig.sharingScope = scope
        # One lane's stream works in a context at a time. CUDA keeps the queues of contexts apart only while the limits
        # of all of them together stay within MAX_CONNECTIONS: 28 contexts for the 14 splits of an H100.
        queues.wqConfig.wqConcurrencyLimit = 1
        return queues


class GreenContext:
    """One partition and the streams made in it; closed by its owner, behind the work on them."""

    def __init__(self, driver: CudaDriver, handle: Any) -> None:
        self.handle = handle
        self._driver = driver
        self._streams: list[int] = []

    def make_stream(self, priority: int) -> int:
        """The handle of a new stream whose work runs on this partition."""
        self._streams.append(self._driver.make_stream(self.handle, priority))
        return self._streams[-1]

    def close(self) -> None:
        """Destroy the streams, which would outlive their context as leaks, and then the context; not twice."""
        for stream in self._streams:
            self._destroy("cuStreamDestroy", stream)
        self._destroy("cuGreenCtxDestroy", self.handle)

    def _destroy(self, function: str, handle: Any) -> None:
        try:
            self._driver.call(function, handle)
        except PartitionUnavailable as error:  # after a fault on the device every call fails; the rest must go on
            logger.warning("a partition was not given back: %s", error)


def _import_bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise PartitionUnavailable(
            f"cuda-bindings cannot be imported ({error}); install it with pip install 'semipd[cuda]'"
        ) from error
    return driver


def _version_text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
