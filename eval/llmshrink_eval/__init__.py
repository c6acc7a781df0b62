"""What compression cost a language model, measured: perplexity, divergence, tasks, speed and size, with error bars.

Knows Hugging Face models and nothing of llmshrink: whoever compressed a model, and how, makes no difference here.
"""
