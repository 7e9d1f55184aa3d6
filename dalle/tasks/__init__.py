"""How each model is trained: losses, players, previews. One file a task, one line here.

``RUNS`` maps the config's ``task`` key to the class that its YAML is validated against, ``TASKS`` to the task itself.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module

# task: (module, the class of its config, the class of the task)
_TABLE = {
    "dvae": ("dalle.tasks.dvae", "DVAERun", "DVAETask"),
    "transformer": ("dalle.tasks.transformer", "TransformerRun", "TransformerTask"),
    "clip": ("dalle.tasks.clip", "ClipRun", "ClipTask"),
    "vs": ("dalle.tasks.vs", "VSRun", "VSTask"),
}


class _Column(Mapping[str, type]):
    """A column of the table. A task's file is imported when it is asked for: open_clip alone takes seconds."""

    def __init__(self, column: int):
        self._column = column

    def __getitem__(self, task: str) -> type:
        module, *names = _TABLE[task]
        return getattr(import_module(module), names[self._column])

    def __iter__(self) -> Iterator[str]:
        return iter(_TABLE)

    def __len__(self) -> int:
        return len(_TABLE)


RUNS = _Column(0)
TASKS = _Column(1)
