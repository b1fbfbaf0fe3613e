"""Images drawn from a model: the engine, what they are drawn for, decoding, files, and the command."""
