"""The Trainer of a run, evaluation, early stops, and the attachment of plan, saving and report."""
