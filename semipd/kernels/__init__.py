"""Operators: plain-torch references, which are the specification and the CPU backend, and their fast twins."""
