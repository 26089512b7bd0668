"""The MiniMax-M3 text model for SGLang, built from SGLang's own layers around its ``RadixAttention``."""
