"""What models are tested on, one file per family, and the statistics they are reported with."""

TASKS: dict[str, str] = {
    "naming": "name a Python function from its body, modules apart; exact match and subtoken F1",
    "knowledge": "80 general-knowledge questions with four choices, by likelihood; what a model forgot",
}
"""What models are tested on, and the measure."""
