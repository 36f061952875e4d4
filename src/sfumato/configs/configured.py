"""Base of models and schedulers: a config whose keys can also be read as attributes, as older code does."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, ClassVar

from sfumato.ecosystem import answer
from sfumato.values import kinds_of

if TYPE_CHECKING:
    from sfumato.configs.config import Config

__all__ = ["Configured"]


class Configured:
    """An object with a frozen `config`."""

    config: Any
    _deprecated_kwargs: ClassVar[tuple[str, ...]] = ()

    def register_to_config(self, **values: Any) -> None:
        """Change config values by replacing the config with a modified copy."""
        config: Config = self.config
        own = {key: values.pop(key) for key in values.keys() & kinds_of(type(config)).keys()}
        self.config = config.replace(**own, extra={**config.extra, **values})

    def __getattr__(self, name: str) -> Any:
        return self._in_config(name)

    def _in_config(self, name: str) -> Any:
        """Return a config value with a `FutureWarning`. Raises an explanatory error if there is no such key."""
        config = self.__dict__.get("config", {})
        if name not in config:
            raise answer("part", name, type(self).__name__)
        text = f"{type(self).__name__}.{name} is {type(self).__name__}.config.{name}; read it there"
        warnings.warn(text, FutureWarning, stacklevel=3)
        return config[name]
