"""Runs a script under a launcher, with the launcher's processes as the ranks of its engines.

    torchrun --nproc-per-node 4 -m semipd.parallel.launch script.py --its --arguments

Rank 0 runs the script, in which `Engine(..., tensor_parallel_size=4)` is what it is without a launcher. The other
processes serve one engine of it after another, and end when it has ended.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from semipd.parallel.group import join_store
from semipd.parallel.launched import Launch, mark_launched, say_end
from semipd.parallel.worker import serve_launched


def main(arguments: list[str]) -> None:
    """Be rank 0 with a script, or serve it."""
    if not arguments:
        sys.exit("usage: torchrun [options] -m semipd.parallel.launch script.py [arguments]")
    launch = Launch()
    if launch.shard.rank > 0:
        serve_launched(launch)
        return
    # The launcher's own store, or one for as long as the script runs.
    store = None if launch.has_store else join_store(launch.host, launch.port, is_host=True)
    mark_launched()
    sys.argv = arguments
    sys.path[0] = os.path.abspath(Path(arguments[0]).parent)
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        say_end(launch)
        del store


if __name__ == "__main__":
    main(sys.argv[1:])
