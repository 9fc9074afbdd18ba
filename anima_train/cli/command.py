"""A command that knows the flags of other programs: it says where their setting stands here."""

import sys
from typing import Any

import typer
from typer.core import TyperCommand

from anima_train.core.errors import ConfigError

# Of click, or of typer's own copy of it.
NO_SUCH_OPTION: Any = sys.modules[typer.BadParameter.__module__].NoSuchOption


class Command(TyperCommand):
    """A command of typer that explains an unknown flag."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the command line.

        Raises:
            ConfigError: a flag is one of another program, or the name of a setting.
        """
        try:
            return super().parse_args(ctx, args)
        except NO_SUCH_OPTION as error:
            from anima_train.config.flags import flag_fault  # imports all settings

            own = [option for parameter in self.params for option in (*parameter.opts, *parameter.secondary_opts)]
            if (fault := flag_fault(error.option_name, own)) is None:
                raise
            raise ConfigError(fault) from error
