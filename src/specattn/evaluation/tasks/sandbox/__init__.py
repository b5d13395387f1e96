"""Programs that nobody has read, run with limits.

What holds them: a process of its own in isolated mode and an empty folder, with limits on processor time, wall time,
memory, open files and the size of what it writes; where the kernel gives user namespaces, no network, and no process
that outlives it. It is a guard against accidents, not against attacks: files that the user may write can be written.
Run it in a container where that matters.
"""

from specattn.evaluation.tasks.sandbox.run import Limits, Verdict, run_python

__all__ = ["Limits", "Verdict", "run_python"]
