"""The script that takes limits upon itself, then becomes the program: ``guard.py PROGRAM SECONDS MEMORY FILE_SIZE``.

It runs in isolated mode and imports nothing of the package.
"""

import ctypes
import os
import resource
import runpy
import signal
import sys

CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG = 1
OPEN_FILES = 64


def isolate() -> None:
    """Go on in a process that is the first of its namespace: its end is the end of all that it started."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare") or libc.unshare(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET) != 0:
        return
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(128 - code if code < 0 else code)
    # Not left behind when the process that waits is killed, even if it leaves the group.
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def limit(seconds: int, memory: int, file_size: int) -> None:
    """What the program may use."""
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: file_size,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 1,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    program, *numbers = sys.argv[1:]
    isolate()
    limit(*map(int, numbers))
    sys.argv = [program]
    runpy.run_path(program, run_name="__main__")
