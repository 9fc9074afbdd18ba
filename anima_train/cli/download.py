"""`anima download`."""


def download() -> None:
    """Fetch the official Anima files, and check their size and hash."""
    from anima_train.model.hub import download_all

    for slot, path in download_all().items():
        print(f"{slot} = '{path}'")
