"""Preference data: files, splits, tokenizer, batches, prompts, and the embedded help-desk task."""

from minirlhf.data.preference_files import PreferencePair, read_preferences

__all__ = ["PreferencePair", "read_preferences"]
