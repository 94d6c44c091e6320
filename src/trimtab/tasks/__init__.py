"""What models are tested on, one file per family, and the statistics they are reported with."""
