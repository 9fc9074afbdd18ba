"""The programs `anima-train` and `anima`: they listen to Ctrl-C before anything is imported that takes its time."""

import os

from anima_train.core.interrupts import listen_to_ctrl_c


def anima_train() -> None:
    """Run `anima-train`."""
    listen_to_ctrl_c(is_main=os.environ.get("RANK", "0") == "0")
    from anima_train.cli.main import train_main

    train_main()


def anima() -> None:
    """Run `anima`."""
    listen_to_ctrl_c(is_main=True)
    from anima_train.cli.main import main

    main()
