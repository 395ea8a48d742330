"""What runs next: queues, lanes, plans and policies. Imports neither torch nor threads of a device."""
