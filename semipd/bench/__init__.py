"""The serving benchmark: open-loop load on an engine or an HTTP server, latency targets, and plots.

`python -m semipd.bench serve` measures and `python -m semipd.bench plot` draws. Nothing of the engine imports this
package, and it needs the extra `bench`.
"""
