"""The text of a recipe: YAML with the line of every key, overrides, and errors that name their place.

Invariant: whatever is wrong in a recipe is told with its place (file and line, or the `--set` that said it), its
dotted key, what was given, and the nearest right key or value. YAML is read as version 1.2 reads numbers (3e-4 is
a number) and truth values (only true and false are).
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cost.errors import UserError
from cost.spelling import closest, did_you_mean

SUFFIXES = (".yaml", ".yml")
MAX_SHOWN_CHARACTERS = 60

Key = tuple[str, ...]


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The C parser where libyaml is there."""


_NUMBER = re.compile(r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)|[-+]?\d[\d_]*\.\d*|[-+]?\.(?:\d+|inf)|\.nan")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{_NUMBER.pattern})$"), list("-+.0123456789"))


@dataclass
class Document:
    """Values of one recipe file and its overrides, and where each was said."""

    path: Path
    values: dict[str, Any]
    lines: dict[Key, int]
    said: dict[Key, str] = field(default_factory=dict)
    """Key of each override -> the override as it was typed."""

    def override(self, text: str) -> None:
        """Apply `a.b=VALUE`, VALUE in YAML.

        Raises:
            UserError: No `=`, no YAML, or a key below something that has none.
        """
        name, equals, value = text.partition("=")
        key = tuple(part.strip() for part in name.split("."))
        if not equals or not all(key):
            raise UserError(f"--set {text}: should be KEY=VALUE, such as --set model.num_layers=4")
        try:
            parsed = yaml.load(value, Loader=_Loader)
        except yaml.YAMLError:
            raise UserError(f"--set {text}: {value!r} is not YAML; put it in quotes if it is text") from None
        table = self.values
        for depth, part in enumerate(key[:-1]):
            inner = table.setdefault(part, {})
            if inner is None:
                inner = table[part] = {}
            if not isinstance(inner, dict):
                above = ".".join(key[: depth + 1])
                raise UserError(f"--set {text}: {above} is {_shown(inner)}, which has no keys")
            table = inner
        table[key[-1]] = parsed
        self.said[key] = f"--set {text}"

    def settle_choice(self, part: str, names: Collection[str]) -> None:
        """Where an override names one of several exclusive keys, the file's others give way."""
        table = self.values.get(part)
        chosen = {name for name in names if (part, name) in self.said}
        if isinstance(table, dict) and any(table.get(name) is not None for name in chosen):
            for name in set(names) - chosen:
                table.pop(name, None)

    def expand(self, part: str, words: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Replace words of a part by what they stand for.

        Raises:
            UserError: One of them stands for nothing; with its place.
        """
        table = self.values.get(part)
        if isinstance(table, dict):
            try:
                self.values[part] = words(table)
            except UserError as error:
                key = (part, str(error).partition(" ")[0].rpartition(".")[2])
                raise UserError(f"{self.place(key)}: {error}") from None

    def make_paths_absolute(self, part: str, name: str, *, keep: Collection[str]) -> None:
        """Resolve local paths against the current directory, so that another process finds the same files."""

        def absolute(item: Any) -> Any:
            if isinstance(item, list):
                return [absolute(each_item) for each_item in item]
            if isinstance(item, dict):
                return {key: absolute(each_item) for key, each_item in item.items()}
            if not isinstance(item, str) or not item or item in keep or "://" in item:
                return item
            return str(Path(item).expanduser().absolute())

        table = self.values.get(part)
        if isinstance(table, dict) and name in table:
            table[name] = absolute(table[name])

    def refuse_truth_values(self, model: type[BaseModel]) -> None:
        """Say so where true or false stands for a number or a text: pydantic would read true as 1.

        Raises:
            UserError: There is one.
        """
        for key, annotation in leaves(model):
            value: Any = self.values
            for part in key:
                value = value.get(part) if isinstance(value, dict) else None
            if isinstance(value, bool) and bool not in (annotation, *typing.get_args(annotation)):
                shown = str(value).lower()
                raise UserError(f"{self.place(key)}: {'.'.join(key)} = {shown}: should not be true or false")

    def place(self, key: Key) -> str:
        """The override that said a key, or the file with the line of the key or of what holds it."""
        for said, text in self.said.items():
            if said[: len(key)] == key or key[: len(said)] == said:
                return text
        for length in range(len(key), 0, -1):
            if key[:length] in self.lines:
                return f"{self.path}:{self.lines[key[:length]]}"
        return str(self.path)

    def explain(self, error: ValidationError, model: type[BaseModel]) -> UserError:
        """Every problem in one message, one line each."""
        known = dict(leaves(model))
        written = known.keys() | self.lines.keys() | self.said.keys()
        problems = list(_problems(error, known, written))
        told = [f"{self.place(key)}: {'.'.join(key)}{message}" for key, message in problems]
        return UserError("\n".join(dict.fromkeys(told)))


def find(name_or_path: str | Path, folder: Path) -> Path:
    """A recipe's file: a path is taken as it is, a name is looked up in `folder`.

    Raises:
        UserError: There is none; names the nearest and lists what exists.
    """
    text = str(name_or_path)
    if (by_name := folder / f"{text}.yaml").parent == folder and by_name.is_file():
        return by_name
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path} is a folder; a recipe is a YAML file.")
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        raise UserError(f"no recipe file {path}; `slm recipes` lists the recipes that have a name.")
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    hint = did_you_mean(text, names, cutoff=0.4) or "."
    raise UserError(f"no recipe is called {text!r}{hint} There are {', '.join(names)}, or give a path to a YAML file.")


def read(path: Path) -> Document:
    """Parse a recipe file, remembering the line of every key.

    Raises:
        UserError: It cannot be read, is no YAML, no mapping, or says a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read the recipe {path}: {reason}.") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[Key, int] = {}
        if isinstance(node, yaml.MappingNode):
            for key, line in _key_lines(node, ()):
                if key in lines:
                    name = ".".join(key)
                    raise UserError(f"{path}:{line}: {name} is given twice; the first is in line {lines[key]}.")
                lines[key] = line
        values = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise UserError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise UserError(f"{path}: should be a mapping of recipe fields, but is {_shown(values)}.")
    return Document(path, values, lines)


def leaves(model: type[BaseModel], above: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every key that a recipe may have, with its type; parts that hold keys come before them."""
    for name, info in model.model_fields.items():
        yield (*above, name), info.annotation
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from leaves(inner, (*above, name))
        elif isinstance(inner, type) and dataclasses.is_dataclass(inner):
            hints = typing.get_type_hints(inner)
            for each_field in dataclasses.fields(inner):
                yield (*above, name, each_field.name), hints[each_field.name]


def _key_lines(node: yaml.MappingNode, above: Key) -> Iterator[tuple[Key, int]]:
    for key_node, value_node in node.value:
        key = (*above, str(key_node.value))
        yield key, key_node.start_mark.line + 1
        if isinstance(value_node, yaml.MappingNode):
            yield from _key_lines(value_node, key)


def _problems(error: ValidationError, known: dict[Key, Any], written: Collection[Key]) -> Iterator[tuple[Key, str]]:
    for item in error.errors(include_url=False):
        key = tuple(str(part) for part in item["loc"])
        while len(key) > 1 and key not in written and key[:-1] in written and item["type"] not in _UNKNOWN:
            key = key[:-1]  # pydantic appends the index of a list or the branch of a union
        inner = (item.get("ctx") or {}).get("error")
        if inner is not None and hasattr(inner, "problems"):
            for problem in inner.problems:
                given = _lookup(item["input"], tuple(problem.key.split(".")))
                yield tuple(problem.key.split(".")), f"{given}: {problem.message}"
        elif item["type"] in _UNKNOWN:
            yield key, f" = {_shown(item['input'])}: no such key; {_nearest_key(key, known)}"
        elif item["type"] == "missing":
            listed = len(key) < len(item["loc"])
            yield key, f" = {_shown(item['input'])}: has too few values" if listed else ": is missing"
        else:
            message = str(inner) if inner is not None else _lowered(str(item["msg"]).removeprefix("Input "))
            hint = _nearest_value(item["input"], known.get(key))
            yield key, f" = {_shown(item['input'])}: {message}{hint}"


_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def _nearest_key(key: Key, known: dict[Key, Any]) -> str:
    siblings = [entry[-1] for entry in known if entry[:-1] == key[:-1]]
    for cutoff in (0.75, 0.5):
        if name := closest(key[-1], siblings, cutoff):
            return f"did you mean {'.'.join((*key[:-1], name))}?"
        elsewhere = {entry[-1]: entry for entry in reversed(list(known))}
        if name := closest(key[-1], elsewhere, cutoff):
            return f"did you mean {'.'.join(elsewhere[name])}?"
    where = ".".join(key[:-1]) or "a recipe"
    return f"{where} has {', '.join(siblings)}." if siblings else f"{where} has no keys."


def _nearest_value(given: Any, annotation: Any) -> str:
    choices = [str(c) for arg in (annotation, *typing.get_args(annotation)) for c in _literals(arg)]
    return did_you_mean(str(given), choices, cutoff=0.4)


def _literals(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


def _lookup(value: Any, key: Key) -> str:
    for part in key:
        value = value.get(part) if isinstance(value, dict) else None
    return "" if value is None or isinstance(value, dict) else f" = {_shown(value)}"


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 1] + "…"


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]
