"""One file per patch of an engine. Each says what it changes, why, for which versions and what retires it."""
