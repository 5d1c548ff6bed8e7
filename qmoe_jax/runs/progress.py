# SPDX-License-Identifier: Apache-2.0
"""What a user sees of a long run, and where its time went."""

import contextlib
import dataclasses
import importlib.util
import threading
import time
from collections.abc import Generator

import rich.console
import rich.progress

from qmoe_jax.runs.timeline import Span

_ADDING = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Progress:
    """A bar with an ETA on a terminal or in a notebook, else lines; and where the time went."""

    bar: rich.progress.Progress
    task: rich.progress.TaskID
    seconds: dict[str, float]  # by phase, also of earlier attempts
    console: rich.console.Console
    spans: list[Span]  # in the order of their ends


@contextlib.contextmanager
def showing(total_work: float, console: rich.console.Console) -> Generator[Progress]:
    """Shows a run of `total_work` units (any unit that time is about linear in)."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.TaskProgressColumn(),
        rich.progress.TextColumn("{task.fields[rate]}"),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("ETA"),
        rich.progress.TimeRemainingColumn(),
    )
    bar = rich.progress.Progress(
        *columns, console=console, disable=not _draws(console), speed_estimate_period=600
    )
    with bar:
        task = bar.add_task("starting", total=total_work, rate="")
        yield Progress(bar, task, {}, console, [])


def advance(progress: Progress, work: float, where: str, tokens: int, seconds: float) -> None:
    """Counts finished work; `tokens` in `seconds` is the rate shown."""
    rate = f"{tokens / max(seconds, 1e-9):,.0f} tokens/s" if tokens else ""
    progress.bar.update(progress.task, advance=work, description=where, rate=rate)


def skip(progress: Progress, work: float) -> None:
    """Takes out of the total what an earlier attempt has done."""
    total = progress.bar.tasks[progress.task].total or 0.0
    progress.bar.update(progress.task, total=total - work)


def committed(progress: Progress, where: str, layer_done: bool) -> None:
    """One more of the commits that a bar counts; a line where it completes a layer."""
    advance(progress, 1.0, where, 0, 0.0)
    if layer_done:
        line(progress, where)


def line(progress: Progress, text: str) -> None:
    """A finished block, where no bar can be drawn."""
    if not _draws(progress.console):
        task = progress.bar.tasks[progress.task]
        share = task.completed / max(task.total or 1.0, 1e-9)
        left = task.elapsed * (1 / share - 1) if task.elapsed and share > 0 else 0.0
        progress.console.print(
            f"{text} ({share:.0%} done, about {_duration(left)} left)", soft_wrap=True
        )


@contextlib.contextmanager
def timed(progress: Progress, phase: str) -> Generator[None]:
    """Adds the time spent inside to `phase`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        spent = time.perf_counter() - start
        with _ADDING:
            progress.seconds[phase] = progress.seconds.get(phase, 0.0) + spent
        thread = threading.current_thread()
        progress.spans.append(Span(phase, thread.name, start, spent, thread.ident or 0))


def _draws(console: rich.console.Console) -> bool:
    """On a terminal, and in a notebook that has the widgets to do so."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
