"""The configuration: its tree, how it is read, and the reference written from it."""
