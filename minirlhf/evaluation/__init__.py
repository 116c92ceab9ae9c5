"""How good a reward model and a policy are, on prompts they were not trained on."""
