"""Between the verbs `eval` and `compare` and `llmshrink_eval`, which knows nothing of us: what only we can hand in."""
