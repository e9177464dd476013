"""Training an editor: what a step sees, its loss, the trainer, and checkpoints on the Hub."""
