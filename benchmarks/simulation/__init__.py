"""An engine under a virtual clock: the real scheduler and policies, with step times from a table, not a device."""
