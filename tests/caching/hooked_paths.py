"""Scans whose reading kills the process, or takes long, in processes other than the test's own."""

import os
import signal
import time
from dataclasses import replace


class HookedPath(str):
    """A path that acts when a build looks at it in another process than the one it was made in."""

    def lower(self):
        if os.getpid() != self.made_in:
            time.sleep(self.seconds)
            # Each process that was ended has left a mark.
            num_ended = len(os.listdir(self.marks))
            if num_ended < self.num_ends:
                (self.marks / f"{os.getpid()}.{num_ended}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().lower()


def hooked(cases, index, marks, *, num_ends=0, seconds=0.0):
    """A set of cases of which one acts.

    Args:
        cases: The set.
        index: Of the case.
        marks: Folder for marks of ended processes; made if missing.
        num_ends: Times that it ends its process by SIGKILL.
        seconds: Time that it takes.
    """
    marks.mkdir(exist_ok=True)
    case = cases.cases[index]
    path = HookedPath(case.images[0])
    path.marks, path.num_ends, path.seconds, path.made_in = marks, num_ends, seconds, os.getpid()
    changed = list(cases.cases)
    changed[index] = replace(case, images=(path,))
    return replace(cases, cases=tuple(changed))
