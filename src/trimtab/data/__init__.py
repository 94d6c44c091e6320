"""From files to token batches: read, encode with the template, batch, inspect."""
