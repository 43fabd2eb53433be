"""A language model: names -> tensors -> hidden states. It knows nothing of prompts or markets."""
