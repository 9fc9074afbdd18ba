"""`python -m anima_train` and `accelerate launch -m anima_train`: the same as `anima-train`."""

from anima_train.cli.start import anima_train

if __name__ == "__main__":
    anima_train()
