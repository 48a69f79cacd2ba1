"""A run's progress: a bar on a terminal, a few lines elsewhere."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Speed(ProgressColumn):
    def render(self, task) -> Text:
        return Text(f"{task.speed:.1f} steps/s" if task.speed else "- steps/s")


class View:
    """Shows where a run is.

    Args:
        steps: how many it has.
        start: how many are done.
        console: where to; standard error unless given.
    """

    def __init__(self, name: str, steps: int, start: int = 0, console: Console | None = None):
        self._console = console or Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
        loss = TextColumn("{task.fields[loss]}")
        # A bar redraws itself, which a log file would keep every frame of.
        self._bar = Progress(*columns, loss, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(name, total=steps, completed=start, loss="")

    def __enter__(self) -> "View":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, step: int, loss: float) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step, loss=f"loss {loss:.3f}")

    def tell(self, message: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)
