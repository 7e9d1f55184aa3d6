"""Tables of names that a family of models outside `dalle` can join, whose entries are imported when asked for."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from operator import attrgetter
from typing import Any


class LazyTable(Mapping[str, Any]):
    """Name -> (module, attribute): reading a name imports its module, which alone may take seconds."""

    def __init__(self, entries: Mapping[str, tuple[str, str]]):
        self._places = dict(entries)

    def add(self, entries: Mapping[str, tuple[str, str]]) -> None:
        """More names, all of them or, when :meth:`check` refuses one, none."""
        self.check(entries)
        self._places.update(entries)

    def check(self, entries: Mapping[str, tuple[str, str]]) -> None:
        """``ValueError`` for a name that stands for something else already."""
        for name, place in entries.items():
            if self._places.get(name, place) != place:
                raise ValueError(f"{name!r} is taken by {'.'.join(self._places[name])}, it cannot become "
                                 f"{'.'.join(place)}")

    @property
    def remedy(self) -> str:
        """What the error about an unknown name ends with, as long as no family has joined."""
        own = __name__.partition(".")[0]
        joined = any(module.partition(".")[0] != own for module, _ in self._places.values())
        return "" if joined else "; from Python, `import gans; gans.register()` adds the GAN family"

    def __getitem__(self, name: str) -> Any:
        module, attribute = self._places[name]
        return attrgetter(attribute)(import_module(module))

    def __contains__(self, name: object) -> bool:      # the mixin's would import the module
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
