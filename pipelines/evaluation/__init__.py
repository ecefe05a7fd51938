"""Trained networks applied: metrics, predictions, explanations, exports."""
