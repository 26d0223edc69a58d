"""torchrun, with the exit code of its ranks: what a scheduler needs to know whether to start the same command again.

    python -m core.launch --nproc_per_node=2 train.py config/small.toml config/carope.toml

Takes torchrun's options (--nnodes, --rdzv_endpoint, --max-restarts, …); one node is the default. torchrun itself does
everything else the same, but ends with 1 whether a signal stopped the run (75 here), an option was wrong (2) or a rank died.
"""

import logging
import os
import signal
import sys
from typing import NoReturn

from core.console import docstring_of
from core.errors import EXIT_REQUEUE, command
from core.host import signals_to
from core.watchdog import PARENT, follow_parent


def launch(arguments: list[str]) -> int:
    """Run torchrun with `arguments` in this process; returns the exit code of the rank that failed first, 0 if none.

    SIGTERM, SIGINT and SIGUSR1 (Slurm's warning) go on to the ranks, which save and leave: EXIT_REQUEUE.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def stop(number: int) -> NoReturn:
        raise SignalException(f"got signal {number}", sigval=signal.Signals(number))

    # Ranks that end with a code have said why, and of those that were killed we say it below
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    options = torchrun.parse_args(arguments)
    on_one_node = (options.rdzv_backend, options.rdzv_endpoint, options.nnodes) == ("static", "", "1:1")
    if on_one_node and options.master_port in (None, 29500):  # torch 2.11 says 29500 where none was given
        options.standalone = True
    n_local = int(options.nproc_per_node) if options.nproc_per_node.isdigit() else 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_local)))
    try:
        with signals_to(stop, "SIGUSR1"):  # torchrun minds SIGTERM and SIGINT itself
            torchrun.run(options)
    except SignalException:
        return EXIT_REQUEUE
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode < 0:
            print(f"error: local rank {first.local_rank} was killed by {signal.Signals(-first.exitcode).name}", file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


@command(work_in_files=True)
def main() -> int:
    """Launch what the command line says."""
    if not sys.argv[1:] or sys.argv[1] in ("-h", "--help"):
        print(docstring_of(__file__))
        return 0
    follow_parent()
    os.environ[PARENT] = str(os.getpid())
    return launch(sys.argv[1:])


if __name__ == "__main__":
    main()
