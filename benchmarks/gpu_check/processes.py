"""A job's process, with everything that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import psutil
from gpu_check.job import Job


class Process:
    """A running job, whose output goes to a log.

    Engines and servers start sessions of their own, so ending the job's process group would leave them behind, with
    the GPU's memory that they hold. Who belongs to it is therefore followed from parent to child.
    """

    def __init__(self, job: Job, log: Path) -> None:
        """Raises OSError where the program is missing, which the log then says."""
        with log.open("w") as output:
            try:
                self._process = subprocess.Popen(
                    job.command, env={**os.environ, **job.environment}, cwd=job.folder, stdin=subprocess.DEVNULL,
                    stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                output.write(f"{error}\n")
                raise
        self._family: set[psutil.Process] = set()

    def poll(self) -> int | None:
        """Its exit status once it has ended; notes meanwhile who belongs to it."""
        status = self._process.poll()
        if status is None:
            self._note()
        return status

    def interrupt(self) -> None:
        """Ask it to end, as Ctrl-C does: pytest then says what has failed so far."""
        self._note()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End it and all that it started, whether it has ended itself or not."""
        self._note()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for one in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):  # which also tells a number that was given anew
                one.kill()
        self._process.wait()

    def _note(self) -> None:
        if self._process.returncode is not None:
            return  # its number may be another's by now
        with contextlib.suppress(psutil.NoSuchProcess):
            self._family.update(psutil.Process(self._process.pid).children(recursive=True))
