"""The claims about AdamW, each with an experiment that could have gone the other way."""
