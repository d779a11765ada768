"""Lua transforms: a consumer's own function over each message, in a process of its own. Knows nothing of Django or the store."""
