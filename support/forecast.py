"""How long a long job will take, said once, from the speed of its first batches."""

import time

from tqdm import tqdm

_MEASURED_SECONDS = 5  # long enough for a speed to be steady
_WORTH_SAYING = 20  # seconds; of shorter jobs the progress bar says enough


class Forecast:
    """Says once how long the rest of a job will take.

    The first batch is not measured: graphs are made in it.

    Args:
      job: str, what takes the time, such as "the features".
      total: int, how much is to be done, in `unit`.
      unit: str, such as "images".
      clock: function that returns seconds.
    """

    def __init__(self, job, total, unit, clock=time.perf_counter):
        self.job, self.left, self.unit, self.clock = job, total, unit, clock
        self.measured, self.begun, self.is_said = 0, None, False

    def add(self, count):
        """Take note of so many that are done, and say how long the rest will take as soon as that is known."""
        self.left -= count
        if self.begun is None:
            self.begun = self.clock()
            return
        self.measured += count
        seconds = self.clock() - self.begun
        if self.is_said or seconds < _MEASURED_SECONDS:
            return
        self.is_said = True
        rate = self.measured / seconds
        if self.left / rate >= _WORTH_SAYING:
            tqdm.write(f"{self.job} will take about {_in_words(self.left / rate)} more, at {rate:.3g} {self.unit}/s")


def _in_words(seconds):
    """A length of time in words: 50 -> "50 s", 1000 -> "17 min", 7500 -> "2 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
