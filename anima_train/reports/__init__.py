"""Pages and sheets for people; no room but cli imports this one."""
