"""Trainer configurations with other values."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from trainer.config import NAMED_GROUPS, TrainConfig


def changed(config: TrainConfig, **values: Any) -> TrainConfig:
    """A copy with other values of fields, in whatever group each stands: `micro_batch_size=8`.

    A field may have the name of its group before it: `checkpoint_every_steps=2`.
    """
    by_group: dict[str, dict[str, Any]] = {}
    own: dict[str, Any] = {}
    places = _places()
    for name, value in values.items():
        group, field = places[name]
        if group is None:
            own[field] = value
        else:
            by_group.setdefault(group, {})[field] = value
    groups = {group: replace(getattr(config, group), **inner) for group, inner in by_group.items()}
    return replace(config, **own, **groups)


def config_from(content: dict[str, Any]) -> TrainConfig:
    """What `dataclasses.asdict` made of a configuration."""
    default = TrainConfig()
    return TrainConfig(
        **{
            name: type(getattr(default, name))(**value) if isinstance(value, dict) else value
            for name, value in content.items()
        }
    )


def _places() -> dict[str, tuple[str | None, str]]:
    """Group and field of each name; the group is None for fields of the configuration itself."""
    default = TrainConfig()
    found: dict[str, tuple[str | None, str]] = {}
    for top in fields(default):
        found[top.name] = (None, top.name)
        group = getattr(default, top.name)
        if is_dataclass(group) and top.name not in NAMED_GROUPS:
            for inner in fields(group):
                found[inner.name] = found[f"{top.name}_{inner.name}"] = (top.name, inner.name)
    return found
