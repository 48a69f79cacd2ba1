"""Tasks beside text: examples drawn from a seed, whose answers a brute-force solver can check."""

from experiments.tasks.copying import Copy
from experiments.tasks.induction import Induction
from experiments.tasks.listops import ListOps
from experiments.tasks.mqar import Mqar
from experiments.tasks.task import Examples, Task

TASKS: dict[str, type[Task]] = {"mqar": Mqar, "copy": Copy, "induction": Induction, "listops": ListOps}

__all__ = ["TASKS", "Copy", "Examples", "Induction", "ListOps", "Mqar", "Task"]
