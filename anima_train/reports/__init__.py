"""Pages that people look at, as templates."""
