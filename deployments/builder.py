"""`serve run deployments:app [model_path=DIR ...]`: the typed builder; and `max-ray serve` beside it."""

# Ray reads the annotation of `app` itself, so this module has no postponed annotations.
from collections.abc import Mapping
from typing import Any, Self

import click
from ray import serve

from max_ray import settings
from max_ray.config import ServeConfig
from max_ray.errors import ConfigError
from max_ray.log import setup_logging
from max_ray.serve.application import build_application, given_settings
from max_ray.serve.foreground import serve_main
from max_ray.serve.serve_config import load_serve_config

__all__ = ["BuilderArguments", "app", "serve_main"]


class BuilderArguments(ServeConfig):
    """ServeConfig as `serve run` makes it from `key=value` arguments: files and environment are merged in, and a
    mistake is one sentence on the terminal instead of a traceback."""

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        if not isinstance(obj, Mapping):
            return super().model_validate(obj, **options)
        try:
            return cls(**given_settings(load_serve_config(obj)[0]))
        except ConfigError as error:
            raise click.ClickException(str(error)) from None


def app(args: BuilderArguments) -> serve.Application:
    """The application, for `serve run deployments:app`. Connects to Ray; checks the model before anything starts.

    Called from Python it takes any ServeConfig.
    """
    try:
        setup_logging(settings.log_level())
        return build_application(args)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
