"""Models and folders as transformers has them."""
