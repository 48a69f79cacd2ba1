"""What a sweep shows while it runs: a live table and a bar on a terminal, a line a point elsewhere."""

import math
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

_COLUMNS = (
    "method",
    "scale",
    "temperature",
    "other axes",
    "loss",
    "bits/byte",
    "accuracy",
    "entropy",
    "logit",
    "first",
    "ms/step",
)

_OPTIONAL = ("other axes", "bits/byte", "accuracy")


class Display:
    """Shows finished points, the running one, and how long the rest will take.

    Args:
        total: training steps of all points that are left.
        console: where to; a terminal gets the live table, anything else lines.
    """

    def __init__(self, total: int, console: Console):
        self._console, self._total, self._done = console, total, 0
        self._rows: list[tuple[str, ...]] = []
        self._started = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
        self._bar = Progress(*columns, TextColumn("{task.fields[pace]}"), TimeElapsedColumn(), console=console)
        self._task = self._bar.add_task("", total=total, pace="")
        self._live = Live(self._view(), console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self._bar, refresh=True)  # the whole table is printed at the end
            self._live.stop()

    def note(self, message: str) -> None:
        """Says what is being done."""
        if self._live is None:
            self._console.print(message, highlight=False, markup=False, soft_wrap=True)
        else:
            self._bar.update(self._task, description=message)

    def step(self, points: int, loss: float) -> None:
        """Counts one step of as many points as are trained together."""
        self._done += points
        if self._live is not None:
            seconds = time.monotonic() - self._started
            rate = self._done / seconds
            left = (self._total - self._done) / rate
            shown = "" if math.isnan(loss) else f", loss {loss:.3f}"
            self._bar.update(self._task, completed=self._done, pace=f"{rate:.1f}/s, {_clock(left)} left{shown}")

    def skip(self, steps: int) -> None:
        """Leaves out steps that a diverged point will not take."""
        self._total -= steps
        self._bar.update(self._task, total=self._total)

    def finished(self, row: dict[str, Any]) -> None:
        """Adds a finished point."""
        self._rows.append(cells(row))
        if self._live is not None:
            self._live.update(self._view())
        else:
            pairs = zip(_COLUMNS, self._rows[-1], strict=True)
            self.note("  ".join(f"{name} {cell}" for name, cell in pairs if cell))

    def _view(self) -> Group:
        rows = max((self._console.height or 24) - 8, 4)  # the last ones, as many as the terminal holds
        return Group(table(self._rows[-rows:]), self._bar)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a row of the table."""
    attention = (f"{row['entropy']:.3f}", f"{row['largest_logit']:.3g}", f"{row['sink_mass']:.3f}")
    success = ("" if math.isnan(row[name]) else f"{row[name]:.4f}" for name in ("bits", "accuracy"))
    numbers = (f"{row['loss']:.4f}", *success, *attention, f"{row['milliseconds']:.1f}")
    if row["diverged_at"] is not None:
        numbers = (f"diverged at step {row['diverged_at']}", *("",) * (len(numbers) - 2), numbers[-1])
    other = ", ".join(
        f"{name.rpartition('.')[2]}={value}"
        for name, value in row["axes"].items()
        if name not in ("attention", "scale", "temperature")
    )
    return (row["label"], f"{row['scale']:.4g}", f"{row['temperature']:.4g}", other, *numbers)


def table(rows: list[tuple[str, ...]]) -> Table:
    """The rows as a table, without the columns that no row fills."""
    shown = [i for i, name in enumerate(_COLUMNS) if name not in _OPTIONAL or any(row[i] for row in rows)]
    made = Table()
    for i in shown:
        made.add_column(_COLUMNS[i], justify="left" if i in (0, 3) else "right", overflow="fold")
    for row in rows:
        made.add_row(*(row[i] for i in shown))
    return made


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
