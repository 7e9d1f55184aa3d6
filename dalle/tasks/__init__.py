"""How each model is trained: losses, players, previews. One file a task, one line here.

``RUNS`` maps the config's ``task`` key to the class that its YAML is validated against, ``TASKS`` to the task itself.
A task's file is imported when it is asked for: open_clip alone takes seconds.
"""

from collections.abc import Mapping

from dalle.lookup import LazyTable

RUNS, TASKS = LazyTable({}), LazyTable({})


def add_tasks(tasks: Mapping[str, tuple[str, str, str]]) -> None:
    """More tasks: the config's ``task`` -> (module, the class of its config, the class of the task).

    ``ValueError``, and nothing is added, for a name that stands for something else; the same again is nothing new.
    """
    classes = {name: (module, task) for name, (module, _, task) in tasks.items()}
    TASKS.check(classes)
    RUNS.add({name: (module, run) for name, (module, run, _) in tasks.items()})
    TASKS.add(classes)


add_tasks({
    "dvae": ("dalle.tasks.dvae", "DVAERun", "DVAETask"),
    "transformer": ("dalle.tasks.transformer", "TransformerRun", "TransformerTask"),
    "clip": ("dalle.tasks.clip", "ClipRun", "ClipTask"),
    "vs": ("dalle.tasks.vs", "VSRun", "VSTask"),
})
