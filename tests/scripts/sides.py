"""What benchmarks can load in processes of their own, without a library."""

import os
import subprocess
import sys
import time

import numpy as np


def load(name, log):
    """A step that writes its name into a file, which shows whose turn it was."""

    def step():
        with open(log, "a") as file:
            file.write(name)
        return np.float32(len(name))

    return step, {"library": name}


def end():
    """Ends its process, as what is killed for its memory does."""
    raise SystemExit(1)


def measured(run, add):
    """A stage that writes a row."""
    add({"what": "one", "ms": float(run.width)})


def broken(run, add):
    """A stage that fails after its first row."""
    add({"what": "one"})
    raise ValueError("no device")


def killed(run, add):
    """A stage whose process ends without a word."""
    os._exit(3)


def endless(run, add):
    """A stage that has to be cut, with the process that it has started."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    add({"what": "one", "pid": child.pid})
    time.sleep(600)
