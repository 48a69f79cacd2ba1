"""Method classes by the names they have on command lines, those of other distributions among them."""

import difflib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import TypeVar

C = TypeVar("C", bound=type)


class Registry(Mapping[str, C]):
    """Command-line names to method classes; loads the entry points of a group when it is first read."""

    def __init__(self, group: str) -> None:
        self._group = group
        self._classes: dict[str, C] = {}
        self._loaded = False

    def add(self, cls: C) -> None:
        name = cls.__name__.lower()
        known = self._classes.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"method name {name!r}: {cls.__module__}.{cls.__qualname__} would replace "
                f"{known.__module__}.{known.__qualname__}; rename one of the classes"
            )
        self._classes[name] = cls

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # before loading: a plugin that reads the registry while it is imported must not recurse
        for entry in metadata.entry_points(group=self._group):
            try:
                entry.load()
            except Exception as error:  # a broken plugin must not take the library down with it
                warnings.warn(f"entry point {entry.name!r} ({entry.value}) failed to load: {error!r}", stacklevel=3)

    def __getitem__(self, name: str) -> C:
        self._load()
        if name not in self._classes:
            raise KeyError(unknown("method", name, self._classes))
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._classes)

    def __len__(self) -> int:
        self._load()
        return len(self._classes)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist, with the nearest one that does."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"unknown {kind} {name!r}: {hint}known: {', '.join(sorted(known))}"
