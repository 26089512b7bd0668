"""The SGLang adapter: registration, start-up checks, attention backend."""
