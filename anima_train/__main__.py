"""`python -m anima_train` and `accelerate launch -m anima_train`: the same as `anima-train`."""

from anima_train.cli.main import train_main

if __name__ == "__main__":
    train_main()
