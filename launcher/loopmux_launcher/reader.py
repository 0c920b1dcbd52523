"""Checking a parsed configuration file: every problem is collected, none stops the search for the next."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from packaging.requirements import InvalidRequirement, Requirement

from loopmux import modelfolders
from loopmux.codec import FieldError, build, show
from loopmux.madefor import other_base
from loopmux.nearest import did_you_mean
from loopmux.weightfiles import Unusable
from loopmux_launcher import interpreters
from loopmux_launcher.config import DEFAULT, DEFAULT_REQUIREMENTS, Configuration, Environment, Model
from loopmux_launcher.document import Document, InvalidConfiguration, Problem, Where, read
from loopmux_launcher.groups import group
from loopmux_launcher.memory import overdrawn
from loopmux_launcher.schema import EnvironmentEntry, FileEntry, ModelEntry

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_INDEX_OPTION = re.compile(
    r"(-i|-f|--index-url|--extra-index-url|--find-links|--trusted-host|--no-binary|--only-binary)[ =]\S+"
    r"|--no-index$|--pre$|--prefer-binary$"
)
_PYTHON_VERSION = re.compile(r"\d+\.\d+(\.\d+)?")


def load(file: Path) -> Configuration:
    """Read, check and resolve a configuration.

    Raises:
        InvalidConfiguration: with every problem that was found.
    """
    document = read(file)
    reader = _Reader(document)
    configuration = reader.configuration()
    problems = (*document.key_problems, *reader.problems)
    if problems:
        raise InvalidConfiguration(problems)
    return configuration


class _Reader:
    """One pass over a document, collecting problems instead of stopping at the first."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.file = document.file.resolve()
        self.root = self.file.parent
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def configuration(self) -> Configuration:
        top = self._top()
        environments = {
            name: self._environment(name, entry)
            for name, value in self._section(top, "environments")
            if (entry := self._fit(EnvironmentEntry, value, ("environments", name)))
        }
        models = {
            name: self._model(name, model, environments)
            for name, value in self._section(top, "models")
            if (model := self._fit(ModelEntry, value, ("models", name)))
        }
        if not models and not self.problems and not self.document.key_problems:
            self._refuse(("models",), "no models", "at least one model under `models:`")
        budget = self._budget(top, models)
        return Configuration(self.document.file, environments, models, tuple(self.notes), budget)

    def _refuse(self, where: Where, found: str, expected: str, hint: str = "") -> None:
        problem = self.document.problem(where, found, expected, hint)
        if all(problem.where != told.where for told in self.problems):  # what a first mistake leads to is no second one
            self.problems.append(problem)

    def _note(self, where: Where, text: str) -> None:
        problem = self.document.problem(where, "", "")
        self.notes.append(f"{problem.file}:{problem.line}: {problem.where}: {text}")

    def _top(self) -> Mapping[Any, Any]:
        value = self.document.value
        if value is None or not isinstance(value, Mapping):
            self._refuse((), "nothing" if value is None else show(value), "a mapping with `models:`")
            return {}
        known = [f.name for f in fields(FileEntry)]
        for name in value:
            if name not in known:
                self._refuse(
                    (str(name),), "an unknown key", "one of " + ", ".join(known), did_you_mean(str(name), known)
                )
        return value

    def _section(self, top: Mapping[Any, Any], section: str) -> list[tuple[str, Any]]:
        value = top.get(section)
        if value is None:
            return []
        if not isinstance(value, Mapping):
            self._refuse((section,), show(value), "a mapping of names")
            return []
        good = []
        for name, entry in value.items():
            where = (section, str(name))
            if not isinstance(name, str):
                continue  # one of the document's key problems
            if section == "environments" and not _NAME.fullmatch(name):
                self._refuse(where, f"the name {name!r}", "letters, digits, '.', '-' and '_'", "it names a folder")
            elif not name.strip() or not name.isprintable():
                self._refuse(where, f"the name {name!r}", "a printable text")
            else:
                good.append((name, entry))
        return good

    def _fit(self, cls: type[T], value: Any, where: Where) -> T | None:
        """Build a dataclass; every key that does not fit is reported and left out."""
        value = {} if value is None else copy.deepcopy(value)
        while True:
            try:
                entry = build(cls, value, strict=True)
            except FieldError as error:
                inner = tuple(int(s) if s.isdecimal() else s for s in re.findall(r"[^.\[\]]+", error.path))
                self.problems.append(self._misfit((*where, *inner), error))
                if not inner or not _drop(value, inner):
                    return None
            else:
                self._bounds(entry, where)
                return entry

    def _misfit(self, where: Where, error: FieldError) -> Problem:
        last = str(where[-1])
        hint = did_you_mean(last, error.expected.removeprefix("one of ").split(", ")) if error.unknown else ""
        if last == "python" and error.found.endswith("(float)"):
            hint = 'put the version in quotes, for example python: "3.11"'
        return self.document.problem(where, error.found, error.expected, hint)

    def _bounds(self, entry: Any, where: Where) -> None:
        for f in fields(entry):
            value, rules = getattr(entry, f.name), f.metadata
            place = (*where, f.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                if rules["minimum"] is not None and not value >= rules["minimum"]:
                    self._refuse(place, show(value), f"at least {rules['minimum']}")
                if rules["above"] is not None and not value > rules["above"]:
                    self._refuse(place, show(value), f"more than {rules['above']}")
                if rules["maximum"] is not None and not value <= rules["maximum"]:
                    self._refuse(place, show(value), f"at most {rules['maximum']}")
            elif isinstance(value, str) and rules["pattern"] and not re.fullmatch(rules["pattern"], value):
                self._refuse(place, show(value), rules["doc"].rstrip("."))
            elif f.name == "echo" and value is not None:
                self._bounds(value, place)

    # --- environments ---

    def _environment(self, name: str, entry: EnvironmentEntry) -> Environment:
        where = ("environments", name)
        self._variables((*where, "variables"), entry.variables)
        if entry.path is not None:
            for other in ("python", "requirements", "index_options"):
                if getattr(entry, other):
                    self._refuse((*where, other), f"{other} beside path", "one of the two", "path is used as it is")
            return Environment(name, self.root, path=self._interpreter_of(where, entry.path), variables=entry.variables)
        lines, file = self._requirements(where, entry.requirements)
        for i, option in enumerate(entry.index_options):
            if not _INDEX_OPTION.match(option):
                expected = "an option such as --extra-index-url URL, --index-url URL, --find-links DIR or --no-index"
                self._refuse((*where, "index_options", i), show(option), expected)
        return Environment(
            name, self.root, self._python(where, entry.python), lines, file, variables=entry.variables,
            index_options=entry.index_options, installer=entry.installer, file=self.file,
        )  # fmt: skip

    def _variables(self, where: Where, variables: Mapping[str, str]) -> None:
        for name, value in variables.items():
            if not name or "=" in name or not _fit_for_system(name):
                self._refuse((*where, name), f"the name {name!r}", "the name of a variable, without '=' and NUL")
            elif not _fit_for_system(value):
                self._refuse((*where, name), show(value), "a text that a variable can hold: no NUL, no half characters")

    def _path(self, where: Where, text: str) -> Path:
        """Where a text leads from the file's folder.

        Not resolved: the interpreter of a virtual environment is a link, and following it leaves the environment.
        """
        try:
            path = self.root / Path(text).expanduser()
            os.access(path, os.F_OK)  # which says so where nothing can have that name
            return Path(os.path.abspath(path))  # noqa: PTH100
        except (RuntimeError, ValueError) as error:  # ~nobody, a NUL
            self._refuse(where, repr(text), "a path", str(error))
            return self.root

    def _interpreter_of(self, where: Where, text: str) -> Path:
        path = self._path((*where, "path"), text)
        interpreter = path / "bin" / "python" if path.is_dir() else path
        if not os.access(interpreter, os.X_OK):
            self._refuse((*where, "path"), f"no interpreter {interpreter}", "a virtual environment or its interpreter")
        return interpreter

    def _python(self, where: Where, text: str | None) -> str:
        if text is None:
            return Environment("", self.root).python
        if _PYTHON_VERSION.fullmatch(text):
            try:
                interpreters.find(text)
            except interpreters.EnvironmentUnusable as error:
                expected = "the version of an interpreter that is on PATH, or the path of one"
                self._refuse((*where, "python"), repr(text), expected, error.message)
            return text
        path = self._path((*where, "python"), text)
        if not path.is_file() or not os.access(path, os.X_OK):
            self._refuse((*where, "python"), f"{text!r}", 'a version such as "3.11" or the path of an interpreter')
        return str(path)

    def _requirements(self, where: Where, value: tuple[str, ...] | str) -> tuple[tuple[str, ...], Path | None]:
        if isinstance(value, str):
            file = self._path((*where, "requirements"), value)
            if not file.is_file():
                hint = f"one package is written as a list: [{value}]" if not value.endswith(".txt") else ""
                self._refuse((*where, "requirements"), f"no file {file}", "a requirements file or a list", hint)
            return (), file.resolve()
        for i, line in enumerate(value):
            if line.startswith(("-", ".", "/")) or "://" in line:  # options, folders and addresses are pip's to judge
                continue
            try:
                Requirement(line)
            except InvalidRequirement as error:
                reason = str(error).splitlines()[0]
                self._refuse((*where, "requirements", i), show(line), "a requirement such as torch==2.13.0", reason)
        return value, None

    # --- models ---

    def _model(self, name: str, entry: ModelEntry, environments: dict[str, Environment]) -> Model:
        where = ("models", name)
        environment = self._environment_of(where, entry, environments)
        own = environments[environment].variables if environment in environments else {}
        base, adapter = self._folders(where, entry, os.environ | dict(own))
        fewest, most = self._processes(where, entry)
        if entry.use_4bit and entry.use_8bit:
            self._refuse((*where, "use_8bit"), "use_4bit and use_8bit", "one of them")
        if entry.port is not None:
            self._note((*where, "port"), "not used: the broker has one endpoint for all models")
        return Model(name, entry, environment, base, adapter, fewest, most)

    def _environment_of(self, where: Where, entry: ModelEntry, known: dict[str, Environment]) -> str | None:
        if entry.environment is None and entry.engine == "echo":
            return None
        name = entry.environment or DEFAULT
        declared = isinstance(self.document.value.get("environments"), Mapping) and (
            name in self.document.value["environments"]  # one that is there but wrong is reported where it stands
        )
        if name == DEFAULT and not declared:
            known[DEFAULT] = Environment(DEFAULT, self.root, requirements=DEFAULT_REQUIREMENTS, file=self.file)
        elif not declared:
            names = sorted({*known, DEFAULT})
            expected = "one of " + ", ".join(names)
            self._refuse((*where, "environment"), f"no environment {name!r}", expected, did_you_mean(name, names))
        return name

    def _folders(self, where: Where, entry: ModelEntry, variables: Mapping[str, str]) -> tuple[str | None, str | None]:
        if entry.engine == "echo":
            for unused in ("base_model", "adapter_dir"):
                if getattr(entry, unused):
                    self._note((*where, unused), "not used by the echo engine")
            return None, None
        adapter = self._adapter(where, entry)
        if adapter is not None and adapter.merged:
            if entry.base_model:
                self._note((*where, "base_model"), f"not used: {adapter.folder} is a merged model")
            return str(adapter.folder), None
        base = None
        if not entry.base_model:
            self._refuse((*where, "base_model"), "nothing", "a model directory or a hub id", "or engine: echo")
        else:
            base = self._base((*where, "base_model"), entry.base_model, variables, pickle=entry.allow_pickle_weights)
        if base and adapter and (note := other_base(adapter.base, base, adapter.folder)):
            self._note((*where, "adapter_dir"), note)
        return base, str(adapter.folder) if adapter else None

    def _base(self, where: Where, text: str, variables: Mapping[str, str], *, pickle: bool) -> str | None:
        try:
            found = modelfolders.base_model(text, self.root, variables)
            if found.folder is not None:
                modelfolders.check_model(found.folder, pickle=pickle)
        except Unusable as error:
            self._refuse(where, error.found, error.expected, error.hint)
            return None
        if found.note:
            self._note(where, found.note)
        return found.name

    def _adapter(self, where: Where, entry: ModelEntry) -> modelfolders.Adapter | None:
        if not entry.adapter_dir:
            return None
        try:
            return modelfolders.adapter(entry.adapter_dir, self.root, pickle=entry.allow_pickle_weights)
        except Unusable as error:
            self._refuse((*where, "adapter_dir"), error.found, error.expected, error.hint)
            return None

    def _processes(self, where: Where, entry: ModelEntry) -> tuple[int | None, int]:
        """Fewest (None: the entry does not say) and most processes."""
        scaled = [name for name in ("min", "max", "idle_timeout") if getattr(entry, name) is not None]
        if entry.workers is not None and scaled:
            self._refuse((*where, scaled[0]), f"{scaled[0]} beside workers", "either workers or min and max")
        fewest = entry.workers if entry.workers is not None else entry.min
        if fewest is None and entry.max is not None:
            fewest = 1
        if entry.max is not None and entry.max < (fewest or 0):
            self._refuse((*where, "max"), show(entry.max), f"at least {fewest}, which is min")
        if entry.idle_timeout is not None and entry.min != 0 and (entry.max or 1) <= (fewest or 1):
            self._note((*where, "idle_timeout"), "without effect: no process beyond min is ever started")
        return fewest, entry.max or max(fewest or 0, 1)

    # --- memory ---

    def _budget(self, top: Mapping[Any, Any], models: Mapping[str, Model]) -> float | None:
        """What all processes may take together, if the file says so and all that it asks for fits into it."""
        if "memory_gib" not in top:
            for name, model in models.items():
                if model.entry.memory_gib is not None:
                    self._note(("models", name, "memory_gib"), "without effect: the file has no memory_gib for all")
            return None
        entry = self._fit(FileEntry, {"memory_gib": top["memory_gib"]}, ())
        if entry is None or entry.memory_gib is None or any(p.where == "memory_gib" for p in self.problems):
            return None
        for name, model in models.items():
            if model.entry.memory_gib is None and model.entry.engine != "echo":
                expected = "memory_gib: what one process takes, because the file limits what all may take together"
                self._refuse(("models", name), "no memory_gib", expected)
        over = None if self.problems else overdrawn(group(models.values(), "", 1), entry.memory_gib)
        if over is not None:
            where: Where = ("memory_gib",) if over.model is None else ("models", over.model, "memory_gib")
            found = show(entry.memory_gib) if over.model is None else show(models[over.model].entry.memory_gib)
            beside = f" (GiB, of which always run: {over.always})" if over.always else " GiB"
            expected = f"a memory_gib of {over.needed:g} or more for all{beside}"
            self._refuse(where, found, expected)
        return entry.memory_gib


def _fit_for_system(text: str) -> bool:
    """Whether a process can be started with this."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _drop(value: Any, path: Where) -> bool:
    """Remove what did not fit; from a list the whole list, so that the indices of later reports stay right."""
    for step in path[:-1]:
        below = value.get(step) if isinstance(value, dict) else None
        if not isinstance(below, dict):
            return isinstance(value, dict) and value.pop(step, None) is not None
        value = below
    if isinstance(value, dict):
        for name in value:
            if str(name) == str(path[-1]):
                del value[name]
                return True
    return False
