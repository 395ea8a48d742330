"""Every error that semipd raises on purpose, as one tree.

    SemiPDError
    +-- ConfigError            (ValueError)    an engine argument, a plan or a policy that cannot work
    +-- RequestError           (ValueError)    a prompt or sampling field that cannot be served
    |   +-- PromptTooLong                      longer than the model or the KV pool allows
    |   +-- QueueFull                          the waiting queue is at its bound
    +-- WeightsError           (ValueError)    a model folder, file or tensor that is missing or malformed
    +-- EngineClosed           (RuntimeError)  the engine was closed by its owner
    +-- EngineDead             (RuntimeError)  a lane failed; `__cause__` is the exception that ended it
    +-- RankError              (RuntimeError)  a rank of a tensor-parallel engine failed or ended
    +-- DeviceError            (RuntimeError)  the device cannot do what was asked
        +-- PartitionUnavailable               no partition of that size can be had

User mistakes are ValueErrors and name what was given, what was expected and what to do. Our own bugs are assertions.
"""


class SemiPDError(Exception):
    """Base of every error that semipd raises on purpose."""


class ConfigError(SemiPDError, ValueError):
    """An engine argument, plan or policy that cannot work."""


class RequestError(SemiPDError, ValueError):
    """A prompt or a sampling field that cannot be served; raised at the call, never later."""


class PromptTooLong(RequestError):
    """The prompt and its output cannot fit the model's context or the KV pool."""


class QueueFull(RequestError):
    """The waiting queue is at `max_queued_requests`; retry later or submit with `wait=True`."""


class WeightsError(SemiPDError, ValueError):
    """A model folder, file or tensor that is missing, malformed or of the wrong shape."""


class EngineClosed(SemiPDError, RuntimeError):
    """The engine was closed; make a new one."""


class EngineDead(SemiPDError, RuntimeError):
    """A lane failed and the engine ended; `__cause__` holds the exception that ended it."""


class RankError(SemiPDError, RuntimeError):
    """A rank of a tensor-parallel engine failed or ended; `__cause__` holds its traceback as text, if it sent one."""


class DeviceError(SemiPDError, RuntimeError):
    """The device cannot do what was asked."""


class PartitionUnavailable(DeviceError):
    """No partition of the requested size can be made on this device."""
