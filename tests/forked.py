"""Starts Python programs as `subprocess` does, without the six seconds of CPU time in which each imports its libraries:
forks them from one process that has imported torch, Lightning and transformers, has built the parsers of fit and
predict, and done nothing else.

A program has its own process id, arguments, environment, folder, streams and session, and ends as Python ends. What the
libraries read from the environment while they are imported is that of the tests, and all hash strings alike. So
programs whose imports are tested, or that must agree whatever the order of their sets, belong to `subprocess`.
"""

import atexit
import ctypes
import functools
import gc
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# from <sys/prctl.h>
_PDEATHSIG = 1  # PR_SET_PDEATHSIG: the signal that comes when the parent ends
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans become children of this process


_Exec = subprocess.Popen  # a test may put this module's in its place


class Popen(_Exec):
    """subprocess.Popen of [sys.executable, SCRIPT, *ARGS] or [sys.executable, "-c", CODE, *ARGS]; no preexec_fn."""

    def _execute_child(self, *values: Any) -> None:
        """Replaces fork and exec. The server forks twice, so that the program, an orphan, becomes our child."""
        if sys.platform != "linux":  # no subreapers
            return super()._execute_child(*values)
        asked = inspect.signature(_Exec._execute_child).bind(self, *values).arguments
        interpreter, *args = asked["args"]
        assert interpreter == sys.executable
        assert not asked["preexec_fn"]
        assert asked["p2cread"] == -1  # nothing is written to it
        told = json.dumps({
            "args": [str(arg) for arg in args],
            "env": dict(os.environ if asked["env"] is None else asked["env"]),
            "cwd": str(asked["cwd"] or Path.cwd()),
            "new_session": asked["start_new_session"],
        }).encode()  # fmt: skip
        streams = [own if given == -1 else given for own, given in ((1, asked["c2pwrite"]), (2, asked["errwrite"]))]
        server, prctl = _server(), ctypes.CDLL(None).prctl
        prctl(_SUBREAPER, 1)
        try:
            socket.send_fds(server, [len(told).to_bytes(4, "big")], streams)
            server.sendall(told)
            self.pid = int(server.recv(16))
        finally:
            prctl(_SUBREAPER, 0)
        self._child_created = True
        names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        return self._close_pipe_fds(*(asked[name] for name in names))


def run(args: list[Any], **options: Any) -> subprocess.CompletedProcess:
    """subprocess.run(args, capture_output=True, text=True)."""
    timeout = options.pop("timeout", 240)
    with Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(args, process.returncode, out, err)


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair()
    env = os.environ | {"PYTHONUNBUFFERED": ""}
    process = _Exec([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=env,
                               stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)  # before the wait: the server ends when nobody asks any more
    return ours


def _serve(asked: socket.socket) -> dict[str, Any] | None:
    """Forks for each request; returns it in the forked process, and None in the server when nobody asks any more."""
    while True:
        size, streams, _, _ = socket.recv_fds(asked, 4, 2)
        if not size:
            return None
        told = b""
        while len(told) < int.from_bytes(size, "big"):
            told += asked.recv(1 << 16)
        read, write = os.pipe()
        if not (between := os.fork()):
            parent = os.getpid()
            if orphan := os.fork():
                os.write(write, str(orphan).encode())
                os._exit(0)
            while os.getppid() == parent:
                time.sleep(1e-4)
            ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)  # a test that fails leaves none that runs forever
            asked.close()
            os.closerange(read, write + 1)
            for stream, of_its_own in enumerate(streams, start=1):
                os.dup2(of_its_own, stream)
                os.close(of_its_own)
            return json.loads(told)
        os.waitpid(between, 0)  # from here on the orphan is a child of who asks
        asked.sendall(os.read(read, 16))
        for file in (read, write, *streams):
            os.close(file)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import numpy as np
    import parsers
    import torch

    parsers.keep(["fit", "predict"], only_the_first=True)

    gc.freeze()  # as the command does
    atexit.register(gc.unfreeze)
    if (request := _serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        np.random.seed()  # as in a new process; `random` does it by itself
        torch.set_num_threads(torch.get_num_threads())  # else autograd's threads may make torch's pool anew at once
        if request["new_session"]:
            os.setsid()
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        sys.path[1:1] = filter(None, request["env"].get("PYTHONPATH", "").split(":"))
        first, *rest = request["args"]
        if first == "-c":
            code, *rest = rest
            sys.argv = ["-c", *rest]
            sys.path[0] = ""
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        else:
            sys.argv = [first, *rest]
            sys.path[0] = str(Path(first).parent)
            runpy.run_path(first, run_name="__main__")
