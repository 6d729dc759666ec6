"""A table of a report: made once, printed to a terminal and written as Markdown."""

from __future__ import annotations

from dataclasses import dataclass

import rich.table
from rich.console import Console


@dataclass(frozen=True)
class Table:
    """Cells are texts; `about` says below the table how to read it."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    about: str = ""

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", _row(self.head), _row(("---",) * len(self.head)), *map(_row, self.rows)]
        return "\n".join([*lines, *(("", self.about) if self.about else ()), ""])

    def show(self, console: Console) -> None:
        table = rich.table.Table(box=None, pad_edge=False)
        for name in self.head:
            table.add_column(name, justify="left" if name in _LEFT else "right")
        for row in self.rows:
            table.add_row(*row)
        console.print(f"[bold]{self.title}[/]\n")
        console.print(table)
        console.print(f"\n[dim]{self.about}[/]\n" if self.about else "")


_LEFT = ("policy", "config", "arm", "rule")


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
