"""The run: its story, what comes before the first step, and what happens between steps."""
