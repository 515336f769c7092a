"""A thread that writes while the training goes on: one thing after another, and nothing is passed over."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Writer:
    """The thread, and what it has to do.

    What fails stays to be done: nothing newer is written before it was tried again. The interpreter does not end before
    the thread has done its work.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "saving")
        self.job: Callable[[], None] | None = None  # begun, or failed
        self.running: Future[None] | None = None

    def begin(self, job: Callable[[], None]) -> None:
        """Have the thread do one more job, behind the last one (`settle`)."""
        self.settle()
        self.job, self.running = job, self.thread.submit(job)

    def look(self) -> None:
        """Raise what the job raised, if it has failed by now; wait for nothing."""
        if self.running is not None and self.running.done():
            self.settle()

    def settle(self) -> None:
        """Wait until nothing is left to do; what had failed is tried again. Raises what the job raises."""
        if self.job is None:
            return
        self.running = self.running or self.thread.submit(self.job)
        wait([self.running])  # a signal that is raised in here leaves all as it is
        done, self.running = self.running, None
        done.result()
        self.job = None

    def close(self) -> None:
        """Wait until the thread has ended; raise nothing."""
        self.thread.shutdown()
