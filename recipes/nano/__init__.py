"""A nano MiniMax-M3 that retrieves: the recipe that trains it. See docs/nano.md."""
