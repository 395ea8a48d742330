"""How a device is shared between the lanes."""
