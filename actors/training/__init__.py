"""Training of nested (sorted) drafts: data that targets generate, sorted fine-tuning, evaluation."""
