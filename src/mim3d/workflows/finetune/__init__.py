"""Fine-tuning: one run or all folds."""
