"""The search space, and its forms for Optuna, for W&B and on Hydra's command line."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override

from sodaops.errors import ConfigError, nearest, some

_KEYS = {"type", "low", "high", "log", "step", "values"}
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_./ -]*")
_RESERVED = {"null", "true", "false", "nan", "inf"}  # Hydra does not read these words as text


@dataclass(frozen=True)
class Dimension:
    """One key of the configuration, and the values that it may take: numbers from low to high, or a list of choices."""

    key: str
    type: str  # float, int or choice
    low: float | int | None = None
    high: float | int | None = None
    log: bool = False
    step: float | int | None = None
    values: tuple[Any, ...] = ()

    def distribution(self) -> Any:
        """Optuna's distribution. Choices that are lists or mappings become JSON text."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.type == "choice":
            return CategoricalDistribution([self.stored(value) for value in self.values])
        if self.type == "int":
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(float(self.low), float(self.high), log=self.log, step=self.step)

    def parameter(self) -> dict[str, Any]:
        """W&B's sweep parameter. Choices are written in Hydra's syntax, since W&B's agents would pass on Python's."""
        if self.type == "choice":
            numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)
            return {"values": [value if numbers else to_override(value) for value in self.values]}
        if self.type == "int" and not self.log and not self.step:
            return {"distribution": "int_uniform", "min": self.low, "max": self.high}
        kind = "log_uniform_values" if self.log else "uniform"
        step = self.step or (1 if self.type == "int" else None)
        bounds = {"min": self.low, "max": self.high}
        return {"distribution": f"q_{kind}", **bounds, "q": step} if step else {"distribution": kind, **bounds}

    def override(self, stored: Any) -> str:
        """``KEY=VALUE`` for a value from Optuna."""
        if self.type == "choice":
            stored = next(v for v in self.values if type(self.stored(v)) is type(stored) and self.stored(v) == stored)
        return f"{self.key}={to_override(stored)}"

    def contains(self, value: Any) -> bool:
        """Whether a value of the configuration lies in this dimension."""
        if self.type == "choice":
            return value in self.values
        return isinstance(value, int | float) and self.low <= value <= self.high

    @staticmethod
    def stored(value: Any) -> Any:
        """A value as Optuna stores it: a list or mapping as JSON text."""
        return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def read_space(space: Mapping[str, Any]) -> list[Dimension]:
    """Reads a nested search space, as in conf/search.

    Raises:
        ConfigError: entries that are not a dimension; all of them at once.

    >>> [d.key for d in read_space({"optim": {"lr": {"type": "float", "low": 1e-4, "high": 1e-3}}})]
    ['optim.lr']
    """
    dimensions, faults = [], []
    for key, entry in _leaves(space):
        fault = _fault(entry)
        if fault is None:
            kind = "choice" if "values" in entry else entry["type"]
            bounds = {name: value for name, value in entry.items() if name not in ("type", "values")}
            dimensions.append(Dimension(key, kind, **bounds, values=tuple(entry.get("values", ()))))
        else:
            faults.append(f"search.space.{key}: {fault}")
    if not dimensions and not faults:
        faults = ["search.space is empty; add keys, for example search.space.optim.lr={type:float,low:1e-4,high:1e-3}."]
    if faults:
        raise ConfigError("\n".join(faults))
    return dimensions


def swept_dimension(override: Override) -> Dimension:
    """Reads a sweep of the command line: ``a,b``, ``range(1,5)``, ``interval(0,1)`` or ``tag(log,interval(1e-4,1e-2))``.

    Raises:
        ConfigError: neither a list of values nor an interval.
    """
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        kind = "int" if isinstance(value.start, int) and isinstance(value.end, int) else "float"
        return Dimension(key, kind, value.start, value.end, log="log" in value.tags)
    if isinstance(value, ChoiceSweep) or override.is_range_sweep():
        return Dimension(key, "choice", values=tuple(_values(override)))
    raise ConfigError(f"{override.input_line}: a search accepts a list, range() or interval() only.")


def check_keys(dimensions: Iterable[Dimension], known: Sequence[str]) -> None:
    """Checks that all keys of a space exist in the configuration.

    Raises:
        ConfigError: all of them at once.
    """
    unknown = [d.key for d in dimensions if d.key not in known]
    if unknown:
        raise ConfigError(
            "\n".join(f"search.space.{key} is not a key of the configuration{nearest(key, known)}." for key in unknown)
        )


def to_override(value: Any) -> str:
    """Writes a value in the syntax of Hydra's command line.

    Raises:
        ConfigError: a mapping with keys that Hydra cannot read.

    >>> [to_override(value) for value in (None, True, 1e-4, "a b", "null", [1, "x"], {"k": 2})]
    ['null', 'true', '0.0001', "'a b'", "'null'", '[1,x]', '{k:2}']
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(to_override, value))}]"
    if isinstance(value, Mapping):
        unreadable = [key for key in value if not _KEY.fullmatch(str(key))]
        if unreadable:
            raise ConfigError(f"{dict(value)}: Hydra cannot read the key {unreadable[0]!r}; expected letters and digits.")
        return "{" + ",".join(f"{key}:{to_override(of)}" for key, of in value.items()) + "}"
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _RESERVED:
        return text
    # In a quoted value only backslashes in front of a quote are special. The closing quote counts too.
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", text)
    escaped = re.sub(r"(\\+)$", lambda match: match[1] * 2, escaped)
    return f"'{escaped}'"


def _leaves(space: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, entry in space.items():
        if isinstance(entry, Mapping) and entry and not _KEYS & entry.keys():
            yield from _leaves(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", entry


def _fault(entry: Any) -> str | None:
    form = "expected {type: float or int, low: …, high: …} or {values: [ … ]}"
    if not isinstance(entry, Mapping):
        return f"{entry!r}; {form}."
    unknown = sorted(entry.keys() - _KEYS)
    if unknown:
        return f"{some(unknown)} is not an attribute of a dimension{nearest(unknown[0], _KEYS)}; {form}."
    if "values" in entry:
        values = entry["values"]
        if set(entry) - {"values", "type"} or entry.get("type", "choice") != "choice":
            return "values cannot be combined with type, low and high."
        if not isinstance(values, list) or len({json.dumps(v, sort_keys=True) for v in values}) < max(2, len(values)):
            return f"values={values!r}; expected a list of at least two different values."
        return None
    if entry.get("type") not in ("float", "int"):
        return f"type={entry.get('type')!r}; {form}."
    kinds = (int,) if entry["type"] == "int" else (int, float)
    for name in ("low", "high", "step"):
        value = entry.get(name)
        if type(value) not in kinds and not (name == "step" and value is None):
            return f"{name}={value!r}; expected a number of type {entry['type']}."
    if not isinstance(entry.get("log", False), bool):
        return f"log={entry['log']!r}; expected true or false."
    if entry["low"] >= entry["high"] or (entry.get("log") and entry["low"] <= 0) or (entry.get("log") and entry.get("step")):
        return f"{dict(entry)}; expected low < high, and with log: low > 0 and no step."
    return None


def _values(override: Override) -> Iterable[Any]:
    for element in override.sweep_iterator():
        yield getattr(element, "text", element)
