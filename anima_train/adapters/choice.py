"""The adapters that a configuration can choose among."""

from typing import Annotated

from pydantic import Field

from anima_train.adapters.full import Full
from anima_train.adapters.loha import Loha
from anima_train.adapters.lokr import Lokr
from anima_train.adapters.lora import Lora

AnyAdapter = Annotated[Lora | Lokr | Loha | Full, Field(discriminator="type")]
