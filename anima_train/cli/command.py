"""A command that knows the flags of other programs: it says where their setting stands here."""

import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperOption

from anima_train.core.errors import ConfigError

# Of click, or of typer's own copy of it.
NO_SUCH_OPTION: Any = sys.modules[typer.BadParameter.__module__].NoSuchOption


def is_hidden(parameter: Any) -> bool:
    """Return True for an option that no help shows."""
    return isinstance(parameter, TyperOption) and parameter.hidden


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

            hidden = {option for each in self.params if is_hidden(each) for option in each.opts}
            own = [option for each in self.params for option in (*each.opts, *each.secondary_opts)]
            own = [option for option in own if option not in hidden]
            error.possibilities = [option for option in error.possibilities or () if option not in hidden]
            if (fault := flag_fault(error.option_name, own)) is None:
                raise
            raise ConfigError(fault) from error
