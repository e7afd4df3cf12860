"""Views of training data: what a batch holds and what a mixture is made of, in the terminal and as HTML pages."""
