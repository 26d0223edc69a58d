"""Runs scripts as `python` does, in processes that have torch already: to import it takes longer than most of the tests.

    python tests/fork_server.py SOCKET                    # serves until its standard input ends
    python tests/fork_server.py SOCKET train.py --help    # runs a script there, and ends as it does

Each script has a process of its own, with the files, folder and environment of the one that asked, and runs from its first line
with modules of ours that nobody has imported before. Scripts of ours that it starts by sys.executable are run the same way.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

# Of the project only what has to come before torch; and nothing that reads an environment variable tests set
NEEDED = ["core.host", "torch._dynamo", "torch.distributed.run", "numpy", "pydantic", "safetensors.torch", "tqdm", "tiktoken",
          "pyarrow.parquet", "matplotlib.pyplot"]  # fmt: skip
NUMBER = struct.Struct("i")
PASSED_ON = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}
PYTHON = """#!/bin/sh
fork() {{ exec {python} -S -E {server} {socket} "$@"; }}
[ "$1" = -u ] && case "$2" in *.py) shift; export PYTHONUNBUFFERED=1 ;; esac
case "$1" in
*.py) fork "$@" ;;
-m) case "$2" in core.* | lab.* | tests.*) fork "$@" ;; esac ;;
esac
exec {python} "$@"
"""


def ask(path: str, words: list[str]) -> NoReturn:
    """Have the server run `words`, hand on signals, and end as that process does."""
    note = Path(f"{path}.{os.getpid()}")  # conftest.Child signals the process itself
    about = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ), "parent": os.getppid()}
    request = json.dumps(about).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        socket.send_fds(server, [NUMBER.pack(len(request))], [0, 1, 2])
        server.sendall(request)
        (child,) = NUMBER.unpack(server.recv(NUMBER.size))
        note.write_text(str(child))
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: os.kill(child, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        code = os.waitstatus_to_exitcode(*NUMBER.unpack(server.recv(NUMBER.size)))
        note.unlink()
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(path: str) -> dict[str, Any]:
    """Fork for each request; returns the request, and its `files`, in the process that is to run it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.tmp")
        listener.listen(64)
        os.rename(f"{path}.tmp", path)  # there once it answers
        while True:
            ready, _, _ = select.select([listener, 0], [], [])
            if 0 in ready:
                os._exit(0)
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with connection:
        header, files, _, _ = socket.recv_fds(connection, NUMBER.size, 3)
        (length,), text = NUMBER.unpack(header), b""
        while len(text) < length:
            text += connection.recv(length - len(text))
        if child := os.fork():
            for file in files:
                os.close(file)
            see_to_its_end(child, connection)
    return json.loads(text) | {"files": files}


def see_to_its_end(child: int, connection: socket.socket) -> NoReturn:
    """Tell how the process ends; end it where nobody waits any more."""
    connection.sendall(NUMBER.pack(child))
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            with suppress(BrokenPipeError):
                connection.sendall(NUMBER.pack(status))
            os._exit(0)
        if select.select([connection], [], [], 0.01)[0]:
            os.kill(child, signal.SIGKILL)
            os._exit(0)


def become(request: dict[str, Any], python: str) -> NoReturn:
    """Run the script, as `python` would."""
    for number, file in enumerate(request["files"]):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where nohup started the tests
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.getppid = lambda: request["parent"]
    for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        sys.path.insert(1, folder)
        if (custom := Path(folder, "sitecustomize.py")).exists():
            runpy.run_path(str(custom), run_name="sitecustomize")
    sys.executable = python
    if "PYTHONUNBUFFERED" in os.environ:
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for name in [name for name in sys.modules if name.partition(".")[0] == "core"]:  # it may be to run a copy of ours
        del sys.modules[name]
    is_module = request["words"][0] == "-m"
    sys.argv = request["words"][is_module:]
    sys.path[0] = request["folder"] if is_module else os.path.dirname(os.path.abspath(sys.argv[0]))
    code: object = 0
    try:
        if is_module:
            sys.modules.pop(sys.argv[0], None)  # of torchrun's, all that it imports may stay
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as left:
        code = left.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    # The end of `python` but for the taking apart of all modules, which here would take longer than most scripts
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in sys.stdout, sys.stderr:
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)


def main(path: str) -> NoReturn:
    """Get ready, serve, and in each process of a script: run it."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    for name in NEEDED:
        with suppress(ImportError):  # a test that needs it says so
            importlib.import_module(name)
    del sys.path[0]
    python = Path(path).with_name("python")
    python.write_text(PYTHON.format(python=sys.executable, server=__file__, socket=path))
    python.chmod(0o755)
    gc.freeze()  # else the end of each process goes through all that lives here
    become(serve(path), str(python))


if __name__ == "__main__":
    if sys.argv[2:]:
        ask(sys.argv[1], sys.argv[2:])
    main(sys.argv[1])
