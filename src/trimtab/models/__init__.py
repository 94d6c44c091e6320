"""Where models come from: a hub id, a local folder, a GGUF file, or one of the embedded ones."""
